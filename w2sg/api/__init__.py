"""What notebooks and programs call: statistics, reports, runs, training, students and decoders. `w2sg` names it all."""
