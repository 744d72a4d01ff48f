# SPDX-License-Identifier: Apache-2.0
"""x to y and back: the algebra of projections, its implementations, and which of them runs."""
