"""What the examples share: reading pictures, rows of results, training that resumes."""
