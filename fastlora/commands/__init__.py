# SPDX-License-Identifier: Apache-2.0
"""The command line's tasks, thin over transformers, TRL, Accelerate and PEFT."""
