"""Tests of the noise contract and of every backend against it."""
