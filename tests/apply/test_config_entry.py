from __future__ import annotations

import copy

import pytest
from transformers import AutoConfig, LlamaConfig

from mlflow_safelock.apply import apply_lock
from mlflow_safelock.apply.config_entry import CONFIG_KEY, config_entry, refuse_locked_config
from mlflow_safelock.errors import AlreadyLockedError


def test_a_configuration_without_an_entry_passes():
    refuse_locked_config(LlamaConfig(), "x")
    refuse_locked_config({"model_type": "llama"}, "x")


def test_a_saved_entry_is_refused_naming_lock_and_alpha(lock, tmp_path):
    config = LlamaConfig()
    config.safelock = config_entry(lock, 4.5)
    config.save_pretrained(tmp_path)
    for carried in (AutoConfig.from_pretrained(tmp_path), config.to_dict()):
        with pytest.raises(AlreadyLockedError, match=rf"The bot .*{lock.digest} at alpha 4\.5"):
            refuse_locked_config(carried, "The bot")


@pytest.mark.parametrize("entry", [True, "yes", {}, []])
def test_an_entry_of_another_form_is_refused_all_the_same(entry):
    with pytest.raises(AlreadyLockedError, match="unknown"):
        refuse_locked_config({CONFIG_KEY: entry}, "The bot")


def test_a_model_in_memory_has_the_entry_as_long_as_it_is_locked(llama, lock):
    handle = apply_lock(llama, lock, 2.0)
    assert llama.config.to_dict()[CONFIG_KEY] == config_entry(lock, 2.0)
    assert copy.deepcopy(llama).config.to_dict()[CONFIG_KEY] == config_entry(lock, 2.0)
    handle.remove()
    assert CONFIG_KEY not in llama.config.to_dict()
