#pragma once
#include <memory>

#include "data/corpus.h"
#include "data/tokenizer.h"
#include "train/train_config.h"

namespace megalodon::train {

struct Corpora {
  std::unique_ptr<data::Tokenizer> tokenizer;
  std::unique_ptr<data::Corpus> training, validation;
};

// Opens the run's data. A single folder of token shards is used as it is; texts are tokenized once, into
// RUN/data.
Corpora open_corpora(const TrainConfig& config);

}  // namespace megalodon::train
