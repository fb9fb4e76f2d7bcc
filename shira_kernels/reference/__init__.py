"""Plain PyTorch kernels: any device, any dtype; the meaning that every other backend is tested against."""
