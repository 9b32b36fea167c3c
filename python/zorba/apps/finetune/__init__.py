"""What ``zorba finetune`` does: data, objective, loop and report."""
