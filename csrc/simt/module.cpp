// The test-only Python module: executor, planted bugs and the ops' kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt/bindings.h"
#include "simt/executor.h"

namespace py = pybind11;

static void set_options(const std::string& order, uint64_t seed, int resident_blocks) {
  simt::options().order = order == "reversed" ? simt::Order::kReversed
                          : order == "random" ? simt::Order::kRandom
                                              : simt::Order::kInOrder;
  simt::options().seed = seed;
  simt::options().resident_blocks = resident_blocks;
}

PYBIND11_MODULE(dmax_simt, m) {
  using namespace dmax::cuda;
  m.def("set_options", set_options);
  m.def("take_launch_count", simt::take_launch_count);
  m.def("take_bytes_read", simt::take_bytes_read);
  m.def("run_planted", simt::planted::run_kernel, py::arg("name"), py::arg("fixed"),
        py::arg("blocks") = 1, py::arg("cluster") = 1);
  m.def("run_last_block_sums", simt::planted::run_last_block_sums);

  py::class_<Gpu>(m, "Gpu").def(py::init<int, int, int, int>());
  py::class_<Chosen>(m, "Chosen")
      .def_readonly("splits", &Chosen::splits)
      .def_readonly("cluster", &Chosen::cluster)
      .def_readonly("blocks", &Chosen::blocks)
      .def_readonly("threads", &Chosen::threads);
  py::class_<LogitsInput>(m, "LogitsInput")
      .def(py::init<int, Address, int64_t, int64_t, int64_t, int64_t, double, Address, int64_t>());
  py::class_<TokensInput>(m, "TokensInput").def(py::init<Address, bool, int, int64_t>());
  py::class_<DrawInput>(m, "DrawInput")
      .def(py::init<double, double, double, double, Address, Address, int64_t>());
  py::class_<EmbeddingInput>(m, "EmbeddingInput")
      .def(py::init<int, Address, int64_t, int64_t, int64_t, int64_t>());
  py::class_<MixInput>(m, "MixInput")
      .def(py::init<Address, bool, Address, Address, int64_t, int>());
  py::class_<StateInput>(m, "StateInput")
      .def(py::init<Address, Address, Address, Address, Address, Address, Address, Address, int64_t,
                    int64_t>());
  py::class_<EditStateInput>(m, "EditStateInput")
      .def(py::init<Address, Address, Address, Address, Address, Address, Address, int64_t,
                    int64_t>());
  py::class_<EditOptionsInput>(m, "EditOptionsInput")
      .def(py::init<int64_t, float, float, int, int, int>());
  py::class_<TransformInput>(m, "TransformInput")
      .def(py::init<Address, Address, Address, Address, unsigned, unsigned, unsigned, unsigned,
                    float, float, float, float>());
  py::class_<LossInput>(m, "LossInput")
      .def(py::init<int, Address, Address, int64_t, int64_t, int64_t, int64_t, Address, bool,
                    int64_t, float, float, double>());

  m.def("splits_of", splits_of);
  m.def("top1_confidence", top1_confidence);
  m.def("top1_partial", top1_partial);
  m.def("topk_confidence", topk_confidence);
  m.def("row_statistics", row_statistics);
  m.def("token_logprobs", token_logprobs);
  m.def("sample_tokens", sample_tokens);
  m.def("sample_partial", sample_partial);
  m.def("sample_merge", sample_merge);
  m.def("top1_merge", top1_merge);
  m.def("prefix_promote", prefix_promote);
  m.def("hybrid_embedding", hybrid_embedding);
  m.def("hybrid_embedding_backward", hybrid_embedding_backward);
  m.def("spd_step_", spd_step_);
  m.def("edit_step_", edit_step_);
  m.def("transform_logits_", transform_logits_);
  m.def("oput_loss", oput_loss);
  m.def("oput_loss_backward", oput_loss_backward);
  m.def("oput_loss_and_grad_", oput_loss_and_grad_);
}
