"""What is right, and how far from it honest arithmetic may be."""
