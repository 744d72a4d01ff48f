# SPDX-License-Identifier: Apache-2.0
"""Under models that PEFT has wrapped. PEFT itself is imported when something here is called."""

from fastlora.peft.patch import register

__all__ = ["register"]
