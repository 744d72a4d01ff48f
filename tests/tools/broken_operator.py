# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the operator: a line each, and what must notice it."""

from __future__ import annotations

from broken_copies import Mutant

MUTANTS = [
    Mutant(
        "a trained bias gets no gradient",
        "fastlora/operator/op.py",
        "dbias = [dy.sum(0) if flags[3] else None",
        "dbias = [None if flags[3] else None",
        "operator/test_projections.py::test_trained_weights_and_biases",
    ),,
    Mutant(
        "second derivatives are those of a constant",
        "fastlora/operator/op.py",
        "    if looked_into(*dys):",
        "    if False:",
        "operator/test_operator.py::test_gradcheck_and_double_backward",
    ),,
    Mutant(
        "projections of other scalings take the first one's",
        "fastlora/operator/op.py",
        "    if all(p.scaling == first.scaling for p in others):",
        "    if True:",
        "operator/test_projections.py::test_modes_and_subclasses_see_the_operator",
    ),,
    Mutant(
        "every block drops the same elements",
        "fastlora/operator/dropout.py",
        "        self.next.add_(self.step)",
        "        pass",
        "kernels/test_kernels.py::test_more_rows_than_one_block_of_the_torch_implementation",
    ),,
    Mutant(
        "every call drops the same elements",
        "fastlora/operator/dropout.py",
        "return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)",
        "return torch.full((1,), 7, dtype=torch.int64, device=device)",
        "operator/test_operator.py::test_successive_seeds_differ operator/test_operator.py::"
        "test_dropout_is_that_of_torch_in_distribution",
    ),,
    Mutant(
        "p is the share that is kept",
        "fastlora/operator/dropout.py",
        "return min(round(p * 65536), 65535) - 32768",
        "return min(round((1 - p) * 65536), 65535) - 32768",
        "operator/test_operator.py::test_dropout_is_that_of_torch_in_distribution",
    ),,
    Mutant(
        "the seed is kept from torch's generator",
        "fastlora/operator/dropout.py",
        "return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)",
        "return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device, "
        "generator=torch.Generator(device))",
        "operator/test_operator.py::test_checkpoint_draws_the_same_mask_again "
        "operator/test_operator.py::test_successive_seeds_differ",
    ),,
    Mutant(
        "the slowest runs",
        "fastlora/operator/plans.py",
        "best = min((i for i in usable if i in times)",
        "best = max((i for i in usable if i in times)",
        "operator/test_plans.py::test_the_fastest_measured_runs_in_each_direction",
    ),,
    Mutant(
        "a GPU is idle when its time is taken",
        "fastlora/operator/timing.py",
        "    while not full and spin < MOST_SPIN:",
        "    while False:",
        "operator/test_timing.py::test_a_phase_is_the_time_of_its_kernels",
    ),,
    Mutant(
        "a way that fails takes the others along",
        "fastlora/operator/timing.py",
        "            if failed is None:",
        "            if True:",
        "operator/test_timing.py::test_a_way_that_fails_fails_alone",
    ),,
    Mutant(
        "few tokens are chosen for as if the host took no time",
        "fastlora/operator/plans.py",
        "        times = with_host or seconds",
        "        times = seconds",
        "operator/test_tuner.py::test_few_tokens_are_timed_with_the_host_too",
    ),,
    Mutant(
        "few tokens are told by their number alone",
        "fastlora/operator/plans.py",
        "elements, limit = M * K,",
        "elements, limit = M,",
        "operator/test_plain.py::test_few_is_counted_in_elements_of_x",
    ),,
    Mutant(
        "few tokens keep a mask and wider copies of many",
        "fastlora/operator/op.py",
        "            keeps_more |= seed",
        "            seed",
        "operator/test_plain.py::test_few_is_less_where_more_is_kept",
    ),,
    Mutant(
        "few tokens lose precision under autocast",
        "fastlora/operator/plans.py",
        "        and not torch._C._is_any_autocast_enabled()\n",
        "",
        "operator/test_plain.py::test_where_the_operator_runs_all_the_same",
    ),,
    Mutant(
        "a draw leaves for another implementation",
        "fastlora/operator/plans.py",
        "            if times[best] < 0.98 * times",
        "            if times[best] < 1.02 * times",
        "operator/test_plans.py::test_a_draw_leaves_the_default",
    ),,
    Mutant(
        "measurements hold for one number of tokens",
        "fastlora/operator/measured.py",
        "return _known(device).get(problem.bucketed())",
        "return _known(device).get(problem)",
        "operator/test_plans.py::test_measurements_hold_for_their_bucket",
    ),,
    Mutant(
        "measurements of other versions count",
        "fastlora/operator/measured.py",
        '        if content.get("versions") != versions(device.type):',
        "        if False:",
        "operator/test_measured.py::test_other_versions_are_not_used_and_are_replaced",
    ),,
    Mutant(
        "a file that is damaged stops the run",
        "fastlora/operator/measured.py",
        "    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:",
        "    except (ValueError, RecursionError) as error:",
        "operator/test_measured.py::test_a_corrupt_file_is_set_aside_with_one_warning",
    ),,
    Mutant(
        "an implementation that fails ends the tuning",
        "fastlora/operator/tuning.py",
        "    except Exception as error:  # whatever",
        "    except KeyError as error:  # whatever",
        "operator/test_tuner.py::test_an_implementation_that_fails_is_left_out",
    ),,
    Mutant(
        "an implementation that is named falls back",
        "fastlora/operator/plans.py",
        '        if why is not None and x.device.type != "meta":\n            raise RuntimeError(',
        "        if why is not None and x.device.type != \"meta\":\n            return 'blocks'\n"
        "            raise RuntimeError(",
        "operator/test_operator.py::test_triton_without_its_interpreter_says_how_to_switch_it_on",
    ),,
    Mutant(
        "the tuner draws from the user's random numbers",
        "fastlora/operator/tuning.py",
        "generator = torch.Generator(device).manual_seed(0)",
        "generator = None",
        "operator/test_tuner.py::test_tuning_on_first_use",
    ),,
    Mutant(
        "a config that does not fit ends the tuning",
        "fastlora/operator/tuning.py",
        "    except Exception as error:  # whatever a compiler",
        "    except KeyError as error:  # whatever a compiler",
        "operator/test_tuner.py::test_a_problem_that_does_not_fit_is_left_out",
    ),,
    Mutant(
        "a negation that was put off is not carried out",
        "fastlora/operator/op.py",
        " or t.is_neg()):",
        "):",
        "operator/test_unusual_operands.py::test_a_put_off_negation_is_carried_out "
        "operator/test_unusual_operands.py::test_gradients_with_a_put_off_negation",
    ),,
    Mutant(
        "few tokens of float16 are scaled when they are rounded",
        "fastlora/operator/eager.py",
        "x_hat, narrow = x, a.dtype == torch.float16",
        "x_hat, narrow = x, False",
        "operator/test_unusual_operands.py::test_float16_is_scaled_before_it_overflows",
    ),,
    Mutant(
        "a scaling leaves float16 factors few bits",
        "fastlora/operator/operands.py",
        "    if b.dtype == torch.float16:",
        "    if False:",
        ""
        "operator/test_unusual_operands.py::test_small_scalings_of_float16_adapters_keep_their_bits",
    ),,
    Mutant(
        "an empty variable names an implementation",
        "fastlora/operator/plans.py",
        'os.environ.get("FASTLORA_IMPL") or "auto"',
        'os.environ.get("FASTLORA_IMPL", "auto")',
        "operator/test_unusual_operands.py::test_an_empty_variable_is_no_choice",
    ),,
    Mutant(
        "~ is a folder",
        "fastlora/operator/measured.py",
        "return Path(folder).expanduser() /",
        "return Path(folder) /",
        "operator/test_unusual_operands.py::test_a_home_in_the_cache_s_name",
    ),,
    Mutant(
        "a second import defines the operators again",
        "fastlora/operator/op.py",
        'if not hasattr(torch.ops.fastlora, "lora_linears"):',
        "if True:",
        ""
        "operator/test_unusual_operands.py::test_a_second_import_works_and_leaves_the_first_as_it_is",
    ),,
    Mutant(
        "several gradients at once are read as one",
        "fastlora/operator/op.py",
        "        or any(dy is not None and (_wrapped(dy) or _legacy(dy)) for dy in dys)",
        "",
        "operator/test_batched_gradients.py::test_gradients_of_several_outputs_at_once",
    ),,
    Mutant(
        "a seed for each sample meets a mask for all",
        "fastlora/operator/dropout.py",
        "z = _mixed(z.mul_(GAMMA) + seed, None, None)",
        "z = _mixed(z.mul_(GAMMA).add_(seed), None, None)",
        "operator/test_batched_gradients.py::test_per_sample_gradients",
    ),,
]
