"""The toy data set: captioned drawings, a simulated annotator and the small bundled model, with no download."""
