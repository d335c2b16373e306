"""Scores of a model: answers to test rows, cells of the score matrix, the general-ability panel."""
