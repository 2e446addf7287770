"""Brings scripts over that were written for other ways of training in mixed precision."""
