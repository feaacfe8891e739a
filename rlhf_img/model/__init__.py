"""Krea 2 as a library: loading, conditioning, the forward pass, flow mathematics, LoRA roles, export.

The functions live in one module each: `loading.load`, `conditioning.Conditioner`, `forward.velocity`,
`flow.sigmas` and its steps, `sampling.sample`, `vae.decode`, `lora.role`, `export.save_lora`. Importing the room alone
does not import torch.
"""
