# SPDX-License-Identifier: Apache-2.0
"""The operator as modules: `LoRALinear`, active adapters, layers that run together."""
