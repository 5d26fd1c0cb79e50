"""Judges folders and arrays of images: features, Frechet distance, KID, coverage, CLIP score, latency, protocols, a report.

Knows nothing of objectives or of the trainer. Heavy packages (open_clip, torch_fidelity, matplotlib) load on first use.
"""
