# SPDX-License-Identifier: Apache-2.0
"""Broken copies of what stands in for PEFT's layers: a line each, and what must notice it."""

from __future__ import annotations

from broken_copies import Mutant

MUTANTS = [
    Mutant(
        "unloaded models have siblings left",
        "fastlora/peft/linear.py",
        "        sibling_search.separate(model)\n",
        "",
        "layers/test_sibling_search.py::test_unloaded_models_are_plain",
    ),
    Mutant(
        "a report does not say why an MLP is not one operator",
        "fastlora/peft/patch.py",
        "report.lookalikes = sibling_search.lookalikes(siblings)",
        "report.lookalikes = []",
        "layers/test_gated_modules.py::test_the_report_says_why_not",
    ),
    Mutant(
        "weights that are not finite are loaded",
        "fastlora/peft/adapters.py",
        "    if broken := [key for key, tensor in tensors.items() if not _finite(tensor)]:\n"
        "        raise ValueError",
        "    if broken := []:\n        raise ValueError",
        "peft/test_hostile_adapters.py::test_weights_that_are_wrong",
    ),
    Mutant(
        "a file may overwrite frozen weights",
        "fastlora/peft/adapters.py",
        "            if changed := [key for key in copies if not _is_own_weight(file, key, made)]:",
        "            if changed := []:",
        "peft/test_hostile_adapters.py::test_weights_that_are_wrong",
    ),
    Mutant(
        "tensors that nobody asked for are taken",
        "fastlora/peft/adapters.py",
        "    if keys != wanted:",
        "    if wanted - keys:",
        "peft/test_hostile_adapters.py::test_weights_that_are_wrong",
    ),
    Mutant(
        "a key that comes twice is taken",
        "fastlora/peft/adapters.py",
        "    if len(values) != len(pairs):",
        "    if False:",
        "peft/test_hostile_adapters.py::test_a_config_file_that_is_malformed",
    ),
    Mutant(
        "a pattern may run for ever",
        "fastlora/peft/adapters.py",
        "made = plan(model, config, adapter, adapter_dtype, seconds=_PATTERN_SECONDS)",
        "made = plan(model, config, adapter, adapter_dtype, seconds=3.0)",
        "peft/test_hostile_adapters.py::test_a_pattern_that_never_ends",
    ),
    Mutant(
        "an adapter is written in place",
        "fastlora/peft/adapters.py",
        "temporary = {path: temporary_of(path) for path in contents}",
        "temporary = {path: path for path in contents}",
        "peft/test_adapter_files.py::test_a_full_disk_leaves_the_old_adapter "
        "peft/test_adapter_files.py::"
        "test_where_it_cannot_be_written",
    ),
    Mutant(
        "the first file gets its name before the second is written",
        "fastlora/peft/adapters.py",
        "                os.fsync(file.fileno())\n",
        "                os.fsync(file.fileno())\n            os.replace(temporary[path], path)\n",
        "peft/test_adapter_files.py::test_a_failing_system_call_leaves_the_old_adapter",
    ),
    Mutant(
        "the config's name decides, not its hash",
        "fastlora/peft/adapters.py",
        "            if path.is_file() and _hash(data := _head(path)) == wanted:",
        "            if path.is_file() and (data := _head(path)):",
        "peft/test_adapter_files.py::test_killed_in_the_middle_there_is_a_whole_adapter",
    ),
    Mutant(
        "a bias stays mapped to its file",
        "fastlora/peft/adapters.py",
        ".to(like.dtype, copy=True)",
        ".to(like.dtype)",
        "peft/test_hostile_adapters.py::test_what_is_written_to_the_file_later_reaches_no_model",
    ),
    Mutant(
        "a loaded adapter trains unasked",
        "fastlora/peft/adapters.py",
        "    apply(model, made, adapter, tensors, trainable=is_trainable)",
        "    apply(model, made, adapter, tensors, trainable=True)",
        "peft/test_adapter_files.py::test_a_loaded_adapter_trains_when_asked_or_switched_to",
    ),
    Mutant(
        "a shard is saved for the whole",
        "fastlora/peft/adapters.py",
        "tensor = tensor.full_tensor()",
        "tensor = tensor.to_local()",
        "kernels/test_launch.py::test_sharded_processes_go_on_from_one",
    ),
    Mutant(
        "any weight is taken for a dense one",
        "fastlora/peft/linear.py",
        "    return type(weight) in _PLAIN and weight.dtype in DTYPES",
        "    return True",
        "peft/test_peft_reasons.py::test_what_is_not_fused",
    ),
    Mutant(
        "Ctrl-C while saving deletes the config that belongs to the weights",
        "fastlora/peft/adapters.py",
        "        if temporary[next(iter(contents))].exists():",
        "        if True:",
        "peft/test_adapter_files.py::test_ctrl_c_as_the_weights_get_their_name",
    ),
    Mutant(
        "weights that were replaced are read with the config from before",
        "fastlora/peft/adapters.py",
        ".get(_CONFIG_HASH) != config_hash:",
        ".get(_CONFIG_HASH) == config_hash + 'of another':",
        "peft/test_hostile_adapters.py::test_weights_replaced_between_two_looks_at_them",
    ),
]
