"""Why training is fast: each file beside the slow, well-known form that tests compare it with.

- batched: an Albumentations pipeline for whole batches on the device; Albumentations itself;
- loader: batches on the device; a DataLoader with Albumentations (support/workers.py);
- jpeg: what JPEG leaves of a batch of images; OpenCV's files, one by one;
- muon: orthogonalised steps for filters; torch.linalg's exact orthogonalisation, torch's SGD;
- cpu: faster forms of layers that are slow on the CPU; torch's own layers.

A first reading can leave this folder out.
"""
