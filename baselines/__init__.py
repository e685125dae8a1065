"""The models that DiG is compared with: DiT, Flash-DiT and DiS."""
