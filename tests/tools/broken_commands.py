# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the command line: a line each, and what must notice it."""

from __future__ import annotations

from broken_copies import Mutant

FINETUNE, DATA = "fastlora/commands/finetune.py", "fastlora/commands/data.py"
TRAINER, RANKS = "fastlora/commands/trainer.py", "fastlora/commands/rank_search.py"

MUTANTS = [
    Mutant(
        "losses that are not finite are trained on",
        "fastlora/commands/shared.py",
        "    if not math.isfinite(loss):",
        "    if False:",
        "commands/test_finetune.py::test_a_run_that_diverges_says_so",
    ),
    Mutant(
        "Ctrl-C ends a run without a word",
        FINETUNE,
        "    except KeyboardInterrupt:",
        "    except ZeroDivisionError:",
        "commands/test_finetune.py::test_ctrl_c_leaves_a_run_that_goes_on",
    ),
    Mutant(
        "a checkpoint that was being written is gone on from",
        FINETUNE,
        "        with contextlib.suppress(ValueError):\n",
        "        if True:\n",
        "commands/test_finetune.py::test_ctrl_c_leaves_a_run_that_goes_on",
    ),
    Mutant(
        "a run goes on with other data of the same name",
        FINETUNE,
        "Path(self.data).read_bytes()",
        'b""',
        "commands/test_finetune.py::test_other_settings_and_other_data_are_refused",
    ),
    Mutant(
        "the prompt is learnt, too",
        DATA,
        "labels += part if learnt else [IGNORED] * len(part)",
        "labels += part",
        "commands/test_data.py::test_only_answers_are_learnt",
    ),
    Mutant(
        "an answer that a template writes otherwise later is learnt twice",
        DATA,
        "        if not before.startswith(done):",
        "        if False:",
        "commands/test_data.py::test_an_answer_that_a_template_writes_otherwise_later_is_context",
    ),
    Mutant(
        "a batch is drawn in an order of the sampler's own",
        TRAINER,
        "return SequentialSampler(self.train_dataset)",
        "return super()._get_train_sampler(train_dataset)",
        "commands/test_finetune.py::test_the_first_loss_is_that_of_the_batch",
    ),
    Mutant(
        "the loss of several processes counts one's tokens",
        TRAINER,
        'self.accelerator.reduce(count, "sum")',
        "count",
        "commands/test_launch.py::test_two_processes_go_on_from_one",
    ),
    Mutant(
        "a gain that seeds do not agree on is one",
        RANKS,
        " and fmean(gains) > noise(gains)",
        "",
        "commands/test_ranks.py::test_what_is_tried_and_taken_and_why",
    ),
    Mutant(
        "info takes any name for an implementation",
        "fastlora/commands/info.py",
        "            return failures + 1",
        "            return failures",
        "commands/test_tune.py::test_info_refuses_what_layers_refuse",
    ),
]
