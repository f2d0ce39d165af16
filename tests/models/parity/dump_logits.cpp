// dump_logits MODEL DATA SEQ_LEN OUT.safetensors: the logits that drrl computes in one process,
// exact attention, fp32, for the first window of a token file; tests/models/parity/test_parity.py
// compares them with Transformers'.
#include <cstdio>
#include <exception>
#include <string>

#include "core/io/safetensors.h"
#include "models/causal_lm/causal_lm.h"
#include "models/causal_lm/model_folder.h"
#include "models/data/token_file.h"

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s MODEL DATA SEQ_LEN OUT.safetensors\n", argv[0]);
    return 2;
  }
  try {
    const auto config = drrl::load_model_config(argv[1]);
    drrl::CausalLM model(config, drrl::Group(), drrl::make_exact_attention());
    model.load(argv[1]);
    const at::Tensor
        tokens = drrl::TokenFile::open(argv[2]).read(0, std::stoll(argv[3])).unsqueeze(0);
    drrl::write_safetensors(argv[4],
                            {{"tokens", tokens}, {"logits", model.logits(tokens).contiguous()}});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dump_logits: %s\n", error.what());
    return 1;
  }
  return 0;
}
