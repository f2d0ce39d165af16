#include "distributed/mpi/mpi_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "core/error.h"

namespace drrl {
namespace {

using c10d::OpType;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

constexpr int kRingTag = 0;
constexpr int kFirstUserTag = 1;

MPI_Datatype reduction_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return MPI_FLOAT;
    case at::kDouble: return MPI_DOUBLE;
    case at::kInt: return MPI_INT32_T;
    case at::kLong: return MPI_INT64_T;
    case at::kByte: return MPI_UINT8_T;
    default:
      TORCH_CHECK(false, "the mpi backend does not reduce ", dtype,
                  " (float32, float64, bfloat16, int32, int64, uint8 it does)");
  }
}

MPI_Datatype element_type(const at::Tensor& tensor) {
  switch (tensor.element_size()) {
    case 1: return MPI_UINT8_T;
    case 2: return MPI_UINT16_T;
    case 4: return MPI_UINT32_T;
    case 8: return MPI_UINT64_T;
    default:
      TORCH_CHECK(false, "the mpi backend moves dtypes of 1, 2, 4 or 8 bytes, not ",
                  tensor.scalar_type());
  }
}

std::pair<MPI_Op, const char*> reduction(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM: return {MPI_SUM, "sum"};
    case c10d::ReduceOp::PRODUCT: return {MPI_PROD, "product"};
    case c10d::ReduceOp::MIN: return {MPI_MIN, "min"};
    case c10d::ReduceOp::MAX: return {MPI_MAX, "max"};
    default:
      TORCH_CHECK(false,
                  "the mpi backend reduces by sum, product, min or max, not by c10d::ReduceOp ",
                  int(op.op_));
  }
}

void check_tensor(const at::Tensor& tensor, const char* what) {
  TORCH_CHECK(tensor.defined(), what, ": an undefined tensor");
  TORCH_CHECK(tensor.device().is_cpu(), what, ": expected a CPU tensor, got one on ",
              tensor.device());
  TORCH_CHECK(tensor.layout() == at::kStrided && tensor.is_contiguous(), what,
              ": expected a contiguous tensor, got sizes ", tensor.sizes(), " with strides ",
              tensor.layout() == at::kStrided ? tensor.strides() : at::IntArrayRef());
  element_type(tensor);
}

const at::Tensor& only(const std::vector<at::Tensor>& tensors, const char* what) {
  TORCH_CHECK(tensors.size() == 1, what, ": expected one tensor, got ", tensors.size());
  check_tensor(tensors[0], what);
  return tensors[0];
}

void check_root(int64_t root, int size, const char* what) {
  TORCH_CHECK(0 <= root && root < size, what, ": rank ", root, " is not in a group of ", size);
}

std::string describe(const char* what, const at::Tensor& tensor) {
  return c10::str(what, " of ", tensor.numel(), " x ", tensor.scalar_type());
}

std::string describe(const char* what, const char* op, const at::Tensor& tensor) {
  return c10::str(what, "(", op, ") of ", tensor.numel(), " x ", tensor.scalar_type());
}

std::string describe(const char* what, const at::Tensor& tensor, const char* preposition,
                     int64_t peer) {
  return c10::str(describe(what, tensor), " ", preposition, " rank ", peer);
}

char* bytes_of(const at::Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.data_ptr()) + element * tensor.element_size();
}

// memmove, but an empty tensor's null pointer is fine.
void copy_bytes(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) {
    std::memmove(to, from, bytes);
  }
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const char* a_begin = bytes_of(a, 0);
  const char* b_begin = bytes_of(b, 0);
  return a_begin < b_begin + b.nbytes() && b_begin < a_begin + a.nbytes();
}

// What MPI reduces in place of `tensor`: itself, or a float32 copy of a bfloat16 tensor (rounding
// once, not once a hop).
at::Tensor reducible(const at::Tensor& tensor) {
  at::Tensor result = tensor.scalar_type() == at::kBFloat16 ? tensor.to(at::kFloat) : tensor;
  reduction_type(result.scalar_type());
  return result;
}

// The steps below run on the progress thread, which must not start a team of OpenMP threads of its
// own: plain loops, no ATen.

// Rounds the float32 `buffer` of a bfloat16 tensor back into it; nothing when the buffer is the
// tensor.
void append_round_back(MpiOperation& operation, const at::Tensor& buffer,
                       const at::Tensor& tensor) {
  if (buffer.is_same(tensor)) {
    return;
  }
  operation.steps.push_back([buffer, tensor](MpiRequests&) {
    const float* from = buffer.const_data_ptr<float>();
    std::transform(from, from + buffer.numel(), tensor.data_ptr<at::BFloat16>(),
                   [](float value) { return at::BFloat16(value); });
  });
}

// Rows [0, rows) of a `rows x pitch` element matrix, columns [begin, begin + count), to or from a
// packed buffer.
struct Columns {
  at::Tensor matrix;
  int64_t rows;
  int64_t pitch;
  int64_t begin;
  int64_t count;

  void pack(const at::Tensor& packed) const {
    for (int64_t row = 0; row < rows; ++row) {
      copy_bytes(bytes_of(packed, row * count), bytes_of(matrix, row * pitch + begin), row_bytes());
    }
  }
  void unpack(const at::Tensor& packed) const {
    for (int64_t row = 0; row < rows; ++row) {
      copy_bytes(bytes_of(matrix, row * pitch + begin), bytes_of(packed, row * count), row_bytes());
    }
  }
  std::size_t row_bytes() const { return static_cast<std::size_t>(count * matrix.element_size()); }
};

// Calls body(begin, count) for pieces of at most `most` elements. An empty range is one empty
// piece: the members still meet.
template <typename Body>
void for_each_piece(int64_t elements, int64_t most, const Body& body) {
  int64_t begin = 0;
  do {
    const int64_t count = std::min(elements - begin, most);
    body(begin, count);
    begin += count;
  } while (begin < elements);
}

}  // namespace

MpiBackend::MpiBackend(MpiCommunicator communicator, c10::intrusive_ptr<MpiOptions> options)
    : Backend(communicator.rank(), communicator.size()),
      communicator_(std::move(communicator)),
      options_(std::move(options)) {
  TORCH_CHECK(
      options_->max_elements >= size_ && options_->max_elements <= std::numeric_limits<int>::max(),
      "MpiOptions::max_elements is ", options_->max_elements, ", expected between ", size_,
      " and 2^31 - 1");
  const auto members = communicator_.world_ranks();
  options_->global_ranks_in_group.assign(members.begin(), members.end());
  progress_ = std::make_unique<MpiProgress>(
      c10::str("world rank ", members[static_cast<std::size_t>(rank_)], ", group '",
               options_->group_name, "' (rank ", rank_, " of ", size_, ", world ranks ",
               c10::Join(" ", members), ")"),
      options_->group_name, rank_);
}

MpiBackend::~MpiBackend() {
  if (progress_->failed()) {
    communicator_.abandon();
  }
}

MpiOperation MpiBackend::operation(OpType type, std::string description,
                                   std::chrono::milliseconds timeout) const {
  MpiOperation result;
  result.type = type;
  result.description = std::move(description);
  result.timeout = timeout > kNoTimeout ? timeout : options_->timeout;
  return result;
}

// buffer <- op over members of buffer, bit-equal on all of them.
void MpiBackend::append_all_reduce(MpiOperation& operation, const at::Tensor& buffer,
                                   MPI_Op op) const {
  const MPI_Comm communicator = communicator_.get();
  const MPI_Datatype type = reduction_type(buffer.scalar_type());
  operation.bytes = 2 * buffer.nbytes();

  if (static_cast<int64_t>(buffer.nbytes()) < options_->ring_bytes || buffer.numel() < size_) {
    for_each_piece(buffer.numel(), options_->max_elements, [&](int64_t begin, int64_t count) {
      operation.steps.push_back([=](MpiRequests& requests) {
        check_mpi(MPI_Iallreduce(MPI_IN_PLACE, bytes_of(buffer, begin), static_cast<int>(count),
                                 type, op, communicator, requests.add()),
                  "MPI_Iallreduce");
      });
    });
    return;
  }

  // The ring: the buffer is cut into one segment per member. Segment i travels once round, summed
  // on its way, and is complete on member i - 1; then the finished segments travel round. Every
  // member sends 2 (size - 1) / size of the buffer.
  const int next = (rank_ + 1) % size_;
  const int previous = (rank_ + size_ - 1) % size_;
  for_each_piece(buffer.numel(), options_->max_elements, [&](int64_t begin, int64_t count) {
    const auto segment_begin = [=, size = int64_t{size_}](int64_t i) {
      return begin + count * (i % size) / size;
    };
    const auto segment_count = [=, size = int64_t{size_}](int64_t i) {
      return begin + count * (i % size + 1) / size - segment_begin(i);
    };
    const at::Tensor arrived = at::empty({count / size_ + 1}, buffer.options());
    const auto exchange = [=](MpiRequests& requests, int64_t outgoing, void* into,
                              int64_t incoming) {
      check_mpi(MPI_Irecv(into, static_cast<int>(segment_count(incoming)), type, previous, kRingTag,
                          communicator, requests.add()),
                "MPI_Irecv");
      check_mpi(MPI_Isend(bytes_of(buffer, segment_begin(outgoing)),
                          static_cast<int>(segment_count(outgoing)), type, next, kRingTag,
                          communicator, requests.add()),
                "MPI_Isend");
    };
    for (int64_t hop = 0; hop < size_ - 1; ++hop) {
      const int64_t outgoing = rank_ - hop + size_;
      operation.steps.push_back([=](MpiRequests& requests) {
        exchange(requests, outgoing, arrived.data_ptr(), outgoing - 1);
      });
      operation.steps.push_back([=](MpiRequests&) {
        check_mpi(
            MPI_Reduce_local(arrived.data_ptr(), bytes_of(buffer, segment_begin(outgoing - 1)),
                             static_cast<int>(segment_count(outgoing - 1)), type, op),
            "MPI_Reduce_local");
      });
    }
    for (int64_t hop = 0; hop < size_ - 1; ++hop) {
      const int64_t outgoing = rank_ + 1 - hop + size_;
      operation.steps.push_back([=](MpiRequests& requests) {
        exchange(requests, outgoing, bytes_of(buffer, segment_begin(outgoing - 1)), outgoing - 1);
      });
    }
  });
}

WorkPtr MpiBackend::allreduce(std::vector<at::Tensor>& tensors,
                              const c10d::AllreduceOptions& options) {
  const at::Tensor tensor = only(tensors, "all_reduce");
  const auto [op, op_name] = reduction(options.reduceOp);
  const at::Tensor buffer = reducible(tensor);
  MpiOperation result = operation(OpType::ALLREDUCE, describe("all_reduce", op_name, tensor),
                                  options.timeout);
  append_all_reduce(result, buffer, op);
  append_round_back(result, buffer, tensor);
  result.outputs = {tensor};
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::reduce(std::vector<at::Tensor>& tensors, const c10d::ReduceOptions& options) {
  const at::Tensor tensor = only(tensors, "reduce");
  check_root(options.rootRank, size_, "reduce");
  const auto [op, op_name] = reduction(options.reduceOp);
  const at::Tensor buffer = reducible(tensor);
  const int root = static_cast<int>(options.rootRank);
  MpiOperation result = operation(OpType::REDUCE, describe("reduce", op_name, tensor),
                                  options.timeout);
  result.bytes = buffer.nbytes();
  for_each_piece(buffer.numel(), options_->max_elements, [&](int64_t begin, int64_t count) {
    result.steps.push_back([=, mpi_op = op, at_root = rank_ == root,
                            communicator = communicator_.get()](MpiRequests& requests) {
      void* data = bytes_of(buffer, begin);
      check_mpi(MPI_Ireduce(at_root ? MPI_IN_PLACE : data, at_root ? data : nullptr,
                            static_cast<int>(count), reduction_type(buffer.scalar_type()), mpi_op,
                            root, communicator, requests.add()),
                "MPI_Ireduce");
    });
  });
  if (rank_ == root) {
    append_round_back(result, buffer, tensor);
  }
  result.outputs = {tensor};
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::broadcast(std::vector<at::Tensor>& tensors,
                              const c10d::BroadcastOptions& options) {
  const at::Tensor tensor = only(tensors, "broadcast");
  check_root(options.rootRank, size_, "broadcast");
  MpiOperation result = operation(
      OpType::BROADCAST, describe("broadcast", tensor, "from", options.rootRank), options.timeout);
  result.bytes = tensor.nbytes();
  for_each_piece(tensor.numel(), options_->max_elements, [&](int64_t begin, int64_t count) {
    result.steps.push_back([=, root = static_cast<int>(options.rootRank),
                            communicator = communicator_.get()](MpiRequests& requests) {
      check_mpi(MPI_Ibcast(bytes_of(tensor, begin), static_cast<int>(count), element_type(tensor),
                           root, communicator, requests.add()),
                "MPI_Ibcast");
    });
  });
  result.outputs = {tensor};
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::allgather(std::vector<std::vector<at::Tensor>>& outputs,
                              std::vector<at::Tensor>& inputs,
                              const c10d::AllgatherOptions& options) {
  const at::Tensor input = only(inputs, "all_gather");
  TORCH_CHECK(outputs.size() == 1 && static_cast<int>(outputs[0].size()) == size_,
              "all_gather: expected one list of ", size_, " outputs");
  for (const at::Tensor& output : outputs[0]) {
    check_tensor(output, "all_gather");
    TORCH_CHECK(output.scalar_type() == input.scalar_type(), "all_gather: output of ",
                output.scalar_type(), ", input of ", input.scalar_type());
  }
  const at::Tensor own = outputs[0][static_cast<std::size_t>(rank_)];
  TORCH_CHECK(own.numel() == input.numel(), "all_gather: this member's output has ", own.numel(),
              " elements, its input ", input.numel());

  // Each member broadcasts its own, all at once: sizes may differ and nothing is packed.
  MpiOperation result = operation(OpType::ALLGATHER, describe("all_gather", input),
                                  options.timeout);
  result.steps.push_back(
      [own, input](MpiRequests&) { copy_bytes(own.data_ptr(), input.data_ptr(), input.nbytes()); });
  std::vector<MpiStep> broadcasts;
  for (int root = 0; root < size_; ++root) {
    const at::Tensor tensor = outputs[0][static_cast<std::size_t>(root)];
    result.bytes += tensor.nbytes();
    for_each_piece(tensor.numel(), options_->max_elements, [&](int64_t begin, int64_t count) {
      broadcasts.push_back([=, communicator = communicator_.get()](MpiRequests& requests) {
        check_mpi(MPI_Ibcast(bytes_of(tensor, begin), static_cast<int>(count), element_type(tensor),
                             root, communicator, requests.add()),
                  "MPI_Ibcast");
      });
    });
  }
  result.steps.push_back([broadcasts](MpiRequests& requests) {
    for (const MpiStep& broadcast : broadcasts) {
      broadcast(requests);
    }
  });
  result.outputs = outputs[0];
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::_allgather_base(at::Tensor& output_, at::Tensor& input_,
                                    const c10d::AllgatherOptions& options) {
  const at::Tensor output = output_;
  const at::Tensor input = input_;
  check_tensor(input, "all_gather");
  check_tensor(output, "all_gather");
  TORCH_CHECK(
      output.scalar_type() == input.scalar_type() && output.numel() == size_ * input.numel(),
      "all_gather: ", size_, " inputs of ", input.numel(), " x ", input.scalar_type(),
      " do not fill an output of ", output.numel(), " x ", output.scalar_type());
  MpiOperation result = operation(OpType::_ALLGATHER_BASE, describe("all_gather", input),
                                  options.timeout);
  result.bytes = output.nbytes();

  const int64_t elements = input.numel();
  const MPI_Datatype type = element_type(input);
  const MPI_Comm communicator = communicator_.get();
  const bool whole = output.numel() <= options_->max_elements;
  for_each_piece(
      elements, whole ? elements : options_->max_elements / size_,
      [&](int64_t begin, int64_t count) {
        // One piece of every member arrives packed; a whole one lands where it belongs.
        const Columns columns{output, size_, elements, begin, count};
        const at::Tensor packed = whole ? output : at::empty({size_ * count}, output.options());
        const bool in_place = overlap(input, packed);
        if (in_place) {
          const at::Tensor own = output.flatten().narrow(0, rank_ * elements, elements);
          result.steps.push_back([own, input](MpiRequests&) {
            copy_bytes(own.data_ptr(), input.data_ptr(), input.nbytes());
          });
        }
        result.steps.push_back([=](MpiRequests& requests) {
          const int n = static_cast<int>(count);
          check_mpi(MPI_Iallgather(in_place ? MPI_IN_PLACE : bytes_of(input, begin), n, type,
                                   packed.data_ptr(), n, type, communicator, requests.add()),
                    "MPI_Iallgather");
        });
        if (!whole) {
          result.steps.push_back([=](MpiRequests&) { columns.unpack(packed); });
        }
      });
  result.outputs = {output};
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::gather(std::vector<std::vector<at::Tensor>>& outputs,
                           std::vector<at::Tensor>& inputs, const c10d::GatherOptions& options) {
  const at::Tensor input = only(inputs, "gather");
  check_root(options.rootRank, size_, "gather");
  const int root = static_cast<int>(options.rootRank);
  std::vector<at::Tensor> gathered;
  if (rank_ == root) {
    TORCH_CHECK(outputs.size() == 1 && static_cast<int>(outputs[0].size()) == size_,
                "gather: expected one list of ", size_, " outputs on the root");
    gathered = outputs[0];
    for (const at::Tensor& output : gathered) {
      check_tensor(output, "gather");
      // Unequal sizes only where everybody needs one piece: nobody but the root knows how many the
      // others need.
      const bool fits = output.numel() == input.numel() ||
                        std::max(output.numel(), input.numel()) <= options_->max_elements / size_;
      TORCH_CHECK(output.scalar_type() == input.scalar_type() && fits, "gather: output of ",
                  output.numel(), " x ", output.scalar_type(), ", input of ", input.numel(), " x ",
                  input.scalar_type());
    }
    TORCH_CHECK(gathered[static_cast<std::size_t>(root)].numel() == input.numel(),
                "gather: the root's output of itself has ",
                gathered[static_cast<std::size_t>(root)].numel(), " elements, its input ",
                input.numel());
  } else {
    TORCH_CHECK(outputs.empty() || outputs[0].empty(), "gather: only the root takes outputs");
  }
  MpiOperation result = operation(OpType::GATHER, describe("gather", input, "to", root),
                                  options.timeout);
  result.bytes = input.nbytes() * static_cast<std::size_t>(rank_ == root ? size_ : 1);
  const MPI_Datatype type = element_type(input);
  for_each_piece(input.numel(), options_->max_elements / size_, [&](int64_t begin, int64_t count) {
    struct Places {  // counts and displacements must live until the call is complete
      std::vector<int> counts, displacements;
      at::Tensor packed;
    };
    const auto places = std::make_shared<Places>();
    int total = 0;
    for (const at::Tensor& output : gathered) {
      places->counts.push_back(
          static_cast<int>(output.numel() == input.numel() ? count : output.numel()));
      places->displacements.push_back(total);
      total += places->counts.back();
    }
    places->packed = at::empty({total}, input.options());
    result.steps.push_back([=, communicator = communicator_.get()](MpiRequests& requests) {
      check_mpi(
          MPI_Igatherv(bytes_of(input, begin), static_cast<int>(count), type,
                       places->packed.data_ptr(), places->counts.data(),
                       places->displacements.data(), type, root, communicator, requests.add()),
          "MPI_Igatherv");
    });
    result.steps.push_back([=](MpiRequests&) {
      for (std::size_t member = 0; member < gathered.size(); ++member) {
        copy_bytes(bytes_of(gathered[member], begin),
                   bytes_of(places->packed, places->displacements[member]),
                   static_cast<std::size_t>(places->counts[member] * input.element_size()));
      }
    });
  });
  result.outputs = gathered;
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::reduce_scatter(std::vector<at::Tensor>& outputs,
                                   std::vector<std::vector<at::Tensor>>& inputs,
                                   const c10d::ReduceScatterOptions& options) {
  const at::Tensor output = only(outputs, "reduce_scatter");
  TORCH_CHECK(inputs.size() == 1 && static_cast<int>(inputs[0].size()) == size_,
              "reduce_scatter: expected one list of ", size_, " inputs");
  for (const at::Tensor& input : inputs[0]) {
    check_tensor(input, "reduce_scatter");
    TORCH_CHECK(input.scalar_type() == output.scalar_type(), "reduce_scatter: output of ",
                output.scalar_type(), ", input of ", input.scalar_type());
  }
  TORCH_CHECK(inputs[0][static_cast<std::size_t>(rank_)].numel() == output.numel(),
              "reduce_scatter: this member's share has ",
              inputs[0][static_cast<std::size_t>(rank_)].numel(), " elements, its output ",
              output.numel());
  const auto [op, op_name] = reduction(options.reduceOp);

  // Share i is reduced to member i, all shares at once: sizes may differ and nothing is packed.
  MpiOperation result = operation(OpType::REDUCE_SCATTER,
                                  describe("reduce_scatter", op_name, output), options.timeout);
  const at::Tensor sum = at::empty(
      output.sizes(),
      output.options().dtype(output.scalar_type() == at::kBFloat16 ? at::kFloat
                                                                   : output.scalar_type()));
  std::vector<MpiStep> reductions;
  for (int root = 0; root < size_; ++root) {
    const at::Tensor share = reducible(inputs[0][static_cast<std::size_t>(root)]);
    result.bytes += share.nbytes();
    for_each_piece(share.numel(), options_->max_elements, [&](int64_t begin, int64_t count) {
      reductions.push_back([=, mpi_op = op, at_root = rank_ == root,
                            communicator = communicator_.get()](MpiRequests& requests) {
        check_mpi(MPI_Ireduce(bytes_of(share, begin), at_root ? bytes_of(sum, begin) : nullptr,
                              static_cast<int>(count), reduction_type(share.scalar_type()), mpi_op,
                              root, communicator, requests.add()),
                  "MPI_Ireduce");
      });
    });
  }
  result.steps.push_back([reductions](MpiRequests& requests) {
    for (const MpiStep& reduce : reductions) {
      reduce(requests);
    }
  });
  if (output.scalar_type() == at::kBFloat16) {
    append_round_back(result, sum, output);
  } else {
    result.steps.push_back([sum, output](MpiRequests&) {
      copy_bytes(output.data_ptr(), sum.data_ptr(), sum.nbytes());
    });
  }
  result.outputs = {output};
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::_reduce_scatter_base(at::Tensor& output_, at::Tensor& input_,
                                         const c10d::ReduceScatterOptions& options) {
  const at::Tensor output = output_;
  const at::Tensor input = input_;
  check_tensor(input, "reduce_scatter");
  check_tensor(output, "reduce_scatter");
  TORCH_CHECK(
      output.scalar_type() == input.scalar_type() && input.numel() == size_ * output.numel(),
      "reduce_scatter: an input of ", input.numel(), " x ", input.scalar_type(), " is not ", size_,
      " outputs of ", output.numel(), " x ", output.scalar_type());
  const auto [op, op_name] = reduction(options.reduceOp);
  MpiOperation result = operation(OpType::_REDUCE_SCATTER_BASE,
                                  describe("reduce_scatter", op_name, output), options.timeout);

  const at::Tensor source = reducible(input);
  const at::Tensor sum = source.is_same(input) && !overlap(input, output)
                             ? output
                             : at::empty({output.numel()}, source.options());
  result.bytes = source.nbytes();
  const int64_t elements = output.numel();
  const MPI_Datatype type = reduction_type(source.scalar_type());
  const bool whole = source.numel() <= options_->max_elements;
  for_each_piece(
      elements, whole ? elements : options_->max_elements / size_,
      [&](int64_t begin, int64_t count) {
        const Columns columns{source, size_, elements, begin, count};
        const at::Tensor packed = whole ? source : at::empty({size_ * count}, source.options());
        if (!whole) {
          result.steps.push_back([=](MpiRequests&) { columns.pack(packed); });
        }
        result.steps.push_back(
            [=, mpi_op = op, communicator = communicator_.get()](MpiRequests& requests) {
              check_mpi(MPI_Ireduce_scatter_block(packed.data_ptr(), bytes_of(sum, begin),
                                                  static_cast<int>(count), type, mpi_op,
                                                  communicator, requests.add()),
                        "MPI_Ireduce_scatter_block");
            });
      });
  if (output.scalar_type() == at::kBFloat16) {
    append_round_back(result, sum, output);
  } else if (!sum.is_same(output)) {
    result.steps.push_back([sum, output](MpiRequests&) {
      copy_bytes(output.data_ptr(), sum.data_ptr(), sum.nbytes());
    });
  }
  result.outputs = {output};
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::alltoall_base(at::Tensor& output_, at::Tensor& input_,
                                  std::vector<int64_t>& output_splits,
                                  std::vector<int64_t>& input_splits,
                                  const c10d::AllToAllOptions& options) {
  const at::Tensor output = output_;
  const at::Tensor input = input_;
  check_tensor(input, "all_to_all");
  check_tensor(output, "all_to_all");
  TORCH_CHECK(input.scalar_type() == output.scalar_type(), "all_to_all: output of ",
              output.scalar_type(), ", input of ", input.scalar_type());

  // MPI_Ialltoallv reads its counts and displacements until it is complete.
  struct Layout {
    std::vector<int> counts;
    std::vector<int> displacements;
  };
  const auto layout = [&](const at::Tensor& tensor, const std::vector<int64_t>& splits,
                          const char* which) {
    TORCH_CHECK(tensor.dim() > 0, "all_to_all: the ", which, " has no dimension to split");
    TORCH_CHECK(tensor.numel() <= std::numeric_limits<int>::max(), "all_to_all: the ", which,
                " has ", tensor.numel(), " elements; the mpi backend takes fewer than 2^31");
    TORCH_CHECK(
        splits.empty() ? tensor.size(0) % size_ == 0 : static_cast<int>(splits.size()) == size_,
        "all_to_all: the ", which, " of ", tensor.size(0), " rows has no split over ", size_,
        " members");
    const int64_t row = tensor.size(0) == 0 ? 0 : tensor.numel() / tensor.size(0);
    auto result = std::make_shared<Layout>();
    int64_t rows = 0;
    for (int member = 0; member < size_; ++member) {
      const int64_t share = splits.empty() ? tensor.size(0) / size_
                                           : splits[static_cast<std::size_t>(member)];
      result->counts.push_back(static_cast<int>(share * row));
      result->displacements.push_back(static_cast<int>(rows * row));
      rows += share;
    }
    TORCH_CHECK(rows == tensor.size(0), "all_to_all: splits of the ", which, " sum to ", rows,
                ", not to its ", tensor.size(0), " rows");
    return result;
  };
  const auto send_layout = layout(input, input_splits, "input");
  const auto receive_layout = layout(output, output_splits, "output");
  MpiOperation result = operation(OpType::ALLTOALL_BASE, describe("all_to_all", input),
                                  options.timeout);
  result.bytes = input.nbytes() + output.nbytes();
  result.steps.push_back([=, communicator = communicator_.get()](MpiRequests& requests) {
    check_mpi(
        MPI_Ialltoallv(input.data_ptr(), send_layout->counts.data(),
                       send_layout->displacements.data(), element_type(input), output.data_ptr(),
                       receive_layout->counts.data(), receive_layout->displacements.data(),
                       element_type(output), communicator, requests.add()),
        "MPI_Ialltoallv");
  });
  result.outputs = {output};
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::send(std::vector<at::Tensor>& tensors, int destination, int tag) {
  const at::Tensor tensor = only(tensors, "send");
  check_root(destination, size_, "send");
  TORCH_CHECK(tag >= 0, "send: tag ", tag, " is negative");
  MpiOperation result = operation(OpType::SEND, describe("send", tensor, "to", destination),
                                  kNoTimeout);
  result.bytes = tensor.nbytes();
  result.steps.push_back([=, most = options_->max_elements,
                          communicator = communicator_.get()](MpiRequests& requests) {
    for_each_piece(tensor.numel(), most, [&](int64_t begin, int64_t count) {
      check_mpi(MPI_Isend(bytes_of(tensor, begin), static_cast<int>(count), element_type(tensor),
                          destination, tag + kFirstUserTag, communicator, requests.add()),
                "MPI_Isend");
    });
  });
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::recv(std::vector<at::Tensor>& tensors, int source, int tag) {
  const at::Tensor tensor = only(tensors, "receive");
  check_root(source, size_, "receive");
  TORCH_CHECK(tag >= 0, "receive: tag ", tag, " is negative");
  MpiOperation result = operation(OpType::RECV, describe("receive", tensor, "from", source),
                                  kNoTimeout);
  result.bytes = tensor.nbytes();
  result.steps.push_back([=, most = options_->max_elements,
                          communicator = communicator_.get()](MpiRequests& requests) {
    for_each_piece(tensor.numel(), most, [&](int64_t begin, int64_t count) {
      check_mpi(MPI_Irecv(bytes_of(tensor, begin), static_cast<int>(count), element_type(tensor),
                          source, tag + kFirstUserTag, communicator, requests.add()),
                "MPI_Irecv");
    });
  });
  // MPI accepts a message shorter than the buffer; the rest of the tensor would keep what was there
  // before.
  result.steps.push_back([=](MpiRequests& requests) {
    int64_t received = 0;
    for (const MPI_Status& status : requests.completed) {
      int count = 0;
      check_mpi(MPI_Get_count(&status, element_type(tensor), &count), "MPI_Get_count");
      received += count;
    }
    check(ErrorKind::kCommunication, received == tensor.numel(), "got only ", received,
          " elements");
  });
  result.outputs = {tensor};
  return progress_->submit(std::move(result));
}

WorkPtr MpiBackend::barrier(const c10d::BarrierOptions& options) {
  MpiOperation result = operation(OpType::BARRIER, "barrier", options.timeout);
  result.steps.push_back([communicator = communicator_.get()](MpiRequests& requests) {
    check_mpi(MPI_Ibarrier(communicator, requests.add()), "MPI_Ibarrier");
  });
  return progress_->submit(std::move(result));
}

}  // namespace drrl
