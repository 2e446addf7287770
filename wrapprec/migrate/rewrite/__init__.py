"""Rewrites training scripts to wrapprec: what a file says, then a plan of edits or a reason not to, then the edits."""
