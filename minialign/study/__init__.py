"""Section 4 of the paper, the analysis: what each choice of the method does to alignment, fidelity and diversity."""
