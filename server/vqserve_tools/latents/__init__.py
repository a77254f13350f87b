"""Latents as rows: of one array, or of a data set, all of its rows or a sample of them."""
