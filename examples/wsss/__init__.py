"""Weakly supervised semantic segmentation from class-token attention, after arXiv 2507.06848."""
