"""Factors, and all that they multiply: parameters, optimizer state, files; and whether outputs stay."""
