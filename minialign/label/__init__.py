"""Stage 1 of the method: people label the images of a run in the browser, or compare two runs blind."""
