"""The networks of Stable Diffusion and CLIP, with the state-dict keys of diffusers and transformers."""
