# SPDX-License-Identifier: Apache-2.0
"""The same sums on every x86 processor; imported before PyTorch and NumPy.

Their libraries add in an order of the processor's own, and where few terms are added that decides
whether one implementation is by chance half as exact as another.
"""

import os

os.environ |= {"MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "2"}
