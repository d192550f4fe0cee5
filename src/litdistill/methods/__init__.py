"""Distillation methods, one file each; `base.py` defines the interface."""

from __future__ import annotations

from litdistill.methods.ab import AB
from litdistill.methods.ard import ARD
from litdistill.methods.at import AT
from litdistill.methods.binary_kd import BinaryKD
from litdistill.methods.cc import CC
from litdistill.methods.cosine import Cosine
from litdistill.methods.crd import CRD
from litdistill.methods.cwd import CWD
from litdistill.methods.dist import DIST
from litdistill.methods.dkd import DKD
from litdistill.methods.fitnet import FitNet
from litdistill.methods.fsp import FSP
from litdistill.methods.ft import FT
from litdistill.methods.hard_pseudo_label import HardPseudoLabel
from litdistill.methods.ickd import ICKD
from litdistill.methods.kd import KD
from litdistill.methods.kdsvd import KDSVD
from litdistill.methods.logit_mse import LogitMSE
from litdistill.methods.mft import MFT
from litdistill.methods.mgd import MGD
from litdistill.methods.mlkd import MLKD
from litdistill.methods.mutual import Mutual
from litdistill.methods.nkd import NKD
from litdistill.methods.nst import NST
from litdistill.methods.ofd import OFD
from litdistill.methods.online import Online
from litdistill.methods.pairs import Pairs
from litdistill.methods.pkd import PKD
from litdistill.methods.pkt import PKT
from litdistill.methods.reviewkd import ReviewKD
from litdistill.methods.rkd import RKD
from litdistill.methods.rslad import RSLAD
from litdistill.methods.shuffled import Shuffled
from litdistill.methods.simkd import SimKD
from litdistill.methods.soft_target_ce import SoftTargetCE
from litdistill.methods.sp import SP
from litdistill.methods.srd import SRD
from litdistill.methods.srrl import SRRL
from litdistill.methods.sum import Sum
from litdistill.methods.supervised import Supervised
from litdistill.methods.teacher_free import TeacherFree
from litdistill.methods.vid import VID
from litdistill.methods.wkd import WKD
from litdistill.methods.wttm import WTTM

__all__ = [
    "AB",
    "ARD",
    "AT",
    "CC",
    "CRD",
    "CWD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "ICKD",
    "KD",
    "KDSVD",
    "MFT",
    "MGD",
    "MLKD",
    "NKD",
    "NST",
    "OFD",
    "PKD",
    "PKT",
    "RKD",
    "RSLAD",
    "SP",
    "SRD",
    "SRRL",
    "VID",
    "WKD",
    "WTTM",
    "BinaryKD",
    "Cosine",
    "FitNet",
    "HardPseudoLabel",
    "LogitMSE",
    "Mutual",
    "Online",
    "Pairs",
    "ReviewKD",
    "Shuffled",
    "SimKD",
    "SoftTargetCE",
    "Sum",
    "Supervised",
    "TeacherFree",
]

# The short name of each class, as in `method=kd`: the name of its file.
NAMES: dict[str, str] = {name: globals()[name].__module__.rpartition(".")[2] for name in __all__}
