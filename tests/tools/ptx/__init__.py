# SPDX-License-Identifier: Apache-2.0
"""Runs compiled PTX on CPU tensors: `running.executing` has every launch inside it run so."""
