"""Native CPU kernels: C++ sources, their build and their loader."""
