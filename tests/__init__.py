"""Tests of zorba_kernels and zorba; helpers are imported as tests.x."""
