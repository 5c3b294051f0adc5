"""Languages of models that translate between many: their codes in the order of their ids, and where a text says which it is.

mBART       text </s> en_XX         the translation begins with de_DE
mBART-50    en_XX text </s>         the same
NLLB        eng_Latn text </s>      the same; with `legacy_behaviour` as mBART
M2M100      __en__ text </s>        the same
Marian      >>fra<< text </s>       the target's language, before the source
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from mini_tfm.errors import InvalidValue

_CODES = {
    "mbart": (
        "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX ro_RO "
        "ru_RU si_LK tr_TR vi_VN zh_CN"
    ),
    "mbart50": (
        "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN "
        "th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
    ),
    "m2m100": (
        "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy id ig ilo "
        "is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd si sk sl so sq sr "
        "ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
    ),
    "wmt21": "en ha is ja cs ru zh de",
    "nllb": (
        "ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn amh_Ethi apc_Arab arb_Arab ars_Arab ary_Arab "
        "arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn ban_Latn bel_Cyrl bem_Latn ben_Beng "
        "bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn cjk_Latn ckb_Arab crh_Latn "
        "cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn fao_Latn "
        "pes_Arab fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn "
        "hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn "
        "jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor knc_Arab knc_Latn kaz_Cyrl kbp_Latn kea_Latn "
        "khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kon_Latn kor_Hang kmr_Latn lao_Laoo lvs_Latn lij_Latn lim_Latn lin_Latn "
        "lit_Latn lmo_Latn ltg_Latn ltz_Latn lua_Latn lug_Latn luo_Latn lus_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Latn "
        "mkd_Cyrl plt_Latn mlt_Latn mni_Beng khk_Cyrl mos_Latn mri_Latn zsm_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva "
        "nso_Latn nus_Latn nya_Latn oci_Latn gaz_Latn ory_Orya pag_Latn pan_Guru pap_Latn pol_Latn por_Latn prs_Arab pbt_Arab "
        "quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Beng scn_Latn shn_Mymr sin_Sinh slk_Latn slv_Latn smo_Latn "
        "sna_Latn snd_Arab som_Latn sot_Latn spa_Latn als_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn szl_Latn "
        "tam_Taml tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi taq_Latn taq_Tfng tpi_Latn tsn_Latn tso_Latn tuk_Latn "
        "tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn "
        "xho_Latn ydd_Hebr yor_Latn yue_Hant zho_Hans zho_Hant zul_Latn"
    ),
}
CODES = {kind: codes.split() for kind, codes in _CODES.items()}
CODES["mbart50"] = CODES["mbart"] + CODES["mbart50"]
# What a text is in, where its folder does not say.
ENGLISH = {"mbart": "en_XX", "mbart50": "en_XX", "m2m100": "en", "wmt21": "en", "nllb": "eng_Latn"}
_NAME = re.compile(r"__([a-z]{2,3})__|([a-z]{2,3}_[A-Z][A-Za-z]{1,3})|>>([A-Za-z_]+)<<")


def languages_of(special: Mapping[int, str]) -> dict[str, int]:
    """The languages among special tokens: code -> id."""
    found = ((_NAME.fullmatch(name), i) for i, name in special.items())
    return {next(filter(None, match.groups())): i for match, i in found if match is not None}


def in_languages(ids: np.ndarray, special: Mapping[int, str], source: str | None, target: str | None) -> tuple[np.ndarray, int | None]:
    """A text's ids (T,), with all that its tokenizer puts around it, as a text in `source` that is to be said in `target`.

    Codes as the tokenizer has them ("en", "en_XX", "eng_Latn"); None: as it is. Returns the ids, and the token that the translation
    must begin with, if there is one. Raises InvalidValue for a language that the tokenizer does not know, or has no place for.
    """
    known, first = languages_of(special), None
    for name, code in (("src_lang", source), ("tgt_lang", target)):
        if code is not None and code not in known:
            told = "expected one of " + ", ".join(sorted(known)) if known else "this model's tokenizer has no languages"
            raise InvalidValue(f"generate: {name}: {told}; got {code!r:.40}")
    in_frame = np.isin(ids, list(known.values()))
    if source is not None:
        if not in_frame.any():
            raise InvalidValue(
                f"generate: src_lang: this model's tokenizer puts no language beside a text, got {source!r:.40}; leave it out"
            )
        ids = np.where(in_frame, known[source], ids)
    if target is not None:
        is_before_source = special[known[target]].startswith(">>")
        ids, first = (np.r_[known[target], ids], None) if is_before_source else (ids, known[target])
    return ids, first
