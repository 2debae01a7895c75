// What module.cpp binds: plain functions, so that only it needs pybind11 and only the kernels are
// built with the sanitizers. An address points into a numpy array; dtypes are 0 float32, 1 bfloat16
// and 2 float16; rows lie `stride` elements apart.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace simt::planted {

std::vector<float> run_kernel(const std::string& name, bool fixed, unsigned blocks,
                              unsigned cluster);
std::pair<float, unsigned> run_last_block_sums(int fence, unsigned blocks);

}  // namespace simt::planted

namespace dmax::cuda {

using Address = uintptr_t;

// The GPU that a launch is shaped for
struct Gpu {
  int multiprocessors;
  int major;
  int max_shared_per_block;
  int most_cluster_rows;
};

// The shape of the launch
struct Chosen {
  int splits = 1;
  int cluster = 1;
  unsigned blocks = 0;
  unsigned threads = 0;
};

struct LogitsInput {
  int dtype;
  Address data;
  int64_t rows, stride, vocab;
  int64_t suppress_token;
  double temperature;
  Address allowed;  // 0: no mask
  int64_t mask_stride;
};

// The options of a draw; row_options and allowed may be absent (0)
struct DrawInput {
  double temperature, top_k, top_p, min_p;
  Address row_options;
  Address allowed;
  int64_t allowed_stride;
};

// Blocks per row (choose_splits of rows.cuh)
int64_t splits_of(int64_t rows, int64_t tiles, int64_t at_once);

Chosen top1_confidence(Gpu gpu, LogitsInput logits, Address token, Address confidence);
Chosen top1_partial(Gpu gpu, LogitsInput logits, int64_t vocab_start, Address maximum,
                    Address sum_exp, Address token);
Chosen topk_confidence(Gpu gpu, LogitsInput logits, int k, Address tokens, Address confidences);
Chosen row_statistics(Gpu gpu, LogitsInput logits, Address temperatures, Address token,
                      Address confidence, Address runner_up, Address entropy, Address logsumexp);
struct TokensInput {
  Address ids;
  bool wide;
  int per_row;
  int64_t ignore_index;
};

Chosen token_logprobs(Gpu gpu, LogitsInput logits, TokensInput tokens, int top_n, Address logprob,
                      Address rank, Address top_ids, Address top_logprobs, Address logsumexp);
Chosen sample_tokens(Gpu gpu, LogitsInput logits, Address seed, bool seed_per_row, DrawInput draw,
                     Address token, Address probability, Address top1_probability,
                     Address relative_confidence);
Chosen sample_partial(Gpu gpu, LogitsInput logits, Address seed, bool seed_per_row,
                      int64_t vocab_start, Address maximum, Address sum_exp, Address token,
                      Address score, Address weight);
Chosen sample_merge(Address maximum, Address sum_exp, Address token, int64_t shards, int64_t rows,
                    double temperature, Address score, Address weight, Address sampled,
                    Address probability);
Chosen top1_merge(Address maximum, Address sum_exp, Address token, int64_t shards, int64_t rows,
                  double temperature, Address merged_token, Address confidence);
Chosen prefix_promote(Address confidence, Address masked, int64_t rows, int block, float threshold,
                      bool inclusive, Address promoted);

struct EmbeddingInput {
  int dtype;
  Address data;
  int64_t stride, vocab, dim;
  int64_t mask_token_id;
};

struct MixInput {
  Address token;  // int64, or int32
  bool wide_tokens;
  Address confidence, masked;
  int64_t positions;
  int k;
};

Chosen hybrid_embedding(EmbeddingInput embedding, MixInput mix, Address out);
// Sorts the ids between its kernels, as the op does with ATen's sort
Chosen hybrid_embedding_backward(EmbeddingInput embedding, MixInput mix, Address grad_output,
                                 Address grad_embedding, Address grad_confidence);

struct StateInput {
  Address editable, masked, token, confidence, converged, step, inputs_embeds;
  Address thresholds;  // 0: none
  int64_t batch, block;
};

Chosen spd_step_(Gpu gpu, LogitsInput logits, EmbeddingInput embedding, StateInput state,
                 float tau_dec, float tau_acc, int semantics, int top_k);

struct EditStateInput {
  Address editable, token, prediction, confidence, post_edit_steps, done;
  Address thresholds;  // 0: none
  int64_t batch, block;
};

struct EditOptionsInput {
  int64_t mask_token_id;
  float threshold, edit_threshold;
  int rule, tokens_per_step, max_post_edit_steps;
};

Chosen edit_step_(Gpu gpu, LogitsInput logits, EditStateInput state, EditOptionsInput options);

struct TransformInput {
  Address bias, output_counts, prompt_tokens, penalties;  // 0: none
  // How many rows of logits share one of each
  unsigned per_bias, per_counts, per_prompt, per_penalties;
  float softcap, repetition, presence, frequency;
};

Chosen transform_logits_(Gpu gpu, LogitsInput logits, TransformInput input);

struct LossInput {
  int dtype;
  Address masked, predicted;  // logits; 0: absent
  int64_t masked_stride, predicted_stride;
  int64_t rows, vocab;
  Address target;
  bool wide_target;
  int64_t ignore_index;
  float label_smoothing, z_loss;
  double temperature;
};

Chosen oput_loss(Gpu gpu, LossInput input, Address loss_masked, Address loss_predicted,
                 Address logsumexp_masked, Address logsumexp_predicted);
// For the pass in `input.masked`
Chosen oput_loss_backward(LossInput input, Address grad_loss, Address logsumexp,
                          Address grad_logits);
Chosen oput_loss_and_grad_(Gpu gpu, LossInput input, Address grad_masked, Address grad_predicted,
                           Address loss_masked, Address loss_predicted);

}  // namespace dmax::cuda
