"""Sections of reports, one file for each thing that a reader sees, in the order of each page.

A section in ``x.py`` has its words in ``../templates/x.html``, unless the template stands behind it here.

========================  ============================================================================================
kind of run               sections
========================  ============================================================================================
labels (naive, filter …)  accuracy (its verdict: ``../verdict.py``), confidence, theory (teacher.html, theory.html),
                          overturned, splits, steps, training (label_training.html)
replies (finetune, cong)  alpha_sweep (cong alone), systems (win rates of the student), held_out_pairs, judge,
                          training (fit_training.html), won_and_lost, replies
a decoder (decode)        decoded (win rates of the decoder), decoded.Cost (cost.html), best_of_n, draft, search_rounds,
                          divergence, alignment_tax, won_and_lost, replies, training (fit_training.html), judge
refinement (refine)       axes (both axes, wins of the student), judge, labels_before_training, won_and_lost, answers,
                          training (fit_training.html), identities
all                       splits (what the data are), provenance (reading.html, provenance.html)
========================  ============================================================================================

Words that several share, as those of a win rate's interval or of replies cut off, are in ``../words.py``. Pages of
``evaluate.py runs=`` have their own templates (summary*.html), which `w2sg.compare` fills.
"""
