"""The members of a teacher that is several networks: each is a diff on `teacher`, of its own weights, options and recipe."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from litdistill.config.instantiate import NETWORK_META_KEYS

OF_ALL = ("ensemble", "ensemble_weights", "ensemble_mean")  # keys of `teacher` that are the ensemble's, and no member's


def members_of(cfg: DictConfig) -> list[DictConfig]:
    """Returns for each member of `teacher.ensemble` the config of a run that it alone would teach; empty without members."""
    found = []
    for diff in (cfg.teacher or {}).get("ensemble") or []:
        one = cfg.copy()
        with open_dict(one):
            one.teacher = merged_member(cfg.teacher, diff)
        found.append(one)
    return found


def merged_member(teacher: Any, diff: Any) -> DictConfig:
    """Returns the node of one member: `teacher` with the diff merged in. Where the diff names another network (`_target_`), the
    options of the teacher's own network do not apply."""
    whole = OmegaConf.create(teacher) if not isinstance(teacher, DictConfig) else teacher.copy()
    with open_dict(whole):
        for key in OF_ALL:
            whole[key] = None
        if diff.get("_target_") not in (None, whole.get("_target_")):
            for name in [str(k) for k in whole if k not in (*NETWORK_META_KEYS, "_target_")]:
                del whole[name]
        merged = OmegaConf.merge(whole, diff)
    assert isinstance(merged, DictConfig)
    return merged
