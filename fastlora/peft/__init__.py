# SPDX-License-Identifier: Apache-2.0
"""Under models that PEFT has wrapped. PEFT itself is imported when something here is called."""

from fastlora.peft.patch import PatchReport, patch_peft, register, unpatch_peft

__all__ = ["PatchReport", "patch_peft", "register", "unpatch_peft"]
