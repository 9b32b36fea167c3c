"""What people run: applications on top of the core, which never imports them."""
