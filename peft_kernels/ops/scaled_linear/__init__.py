"""Linear layers that scale their input or their output and train a bias: IA³, BitFit, LLaMA-Adapter V2."""
