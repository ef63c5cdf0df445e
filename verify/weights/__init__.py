"""Where a checkpoint's tensors are in an export, and what became of them: NumPy alone, whoever read the export."""
