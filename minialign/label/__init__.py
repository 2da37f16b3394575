"""Stage 1 of the method: people label a run's images in the browser, or compare two runs blind."""
