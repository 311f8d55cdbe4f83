"""Kernels written by hand where they beat what libraries and the compiler give.

Each is an op of the namespace ``smc_compile`` with a twin in tensor code, which gives the same where no kernel can be
built or the device has none. Import a kernel from its file. Nothing here imports another part of the package.
"""
