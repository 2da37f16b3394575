"""The embedded world: captioned drawings, a simulated labeller and a small pre-trained pipeline, with no download."""
