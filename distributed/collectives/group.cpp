#include "distributed/collectives/group.h"

#include <algorithm>
#include <optional>

#include <ATen/core/grad_mode.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "core/error.h"

namespace drrl {
namespace {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;

c10d::ReduceOp to_c10d(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum: return c10d::ReduceOp::SUM;
    case ReduceOp::kMax: return c10d::ReduceOp::MAX;
    case ReduceOp::kMin: return c10d::ReduceOp::MIN;
  }
  TORCH_CHECK(false, "unknown ReduceOp ", static_cast<int>(op));
}

// Runs `action`; whatever it throws leaves as Error(kCommunication) that says who was doing what.
template <typename Action>
auto translated(const Group& group, const char* operation, const Action& action) {
  try {
    return action();
  } catch (const Error&) {
    throw;
  } catch (const c10::Error& error) {
    raise(ErrorKind::kCommunication, group.describe(), ": ", operation,
          " failed: ", error.what_without_backtrace());
  } catch (const std::exception& error) {
    raise(ErrorKind::kCommunication, group.describe(), ": ", operation, " failed: ", error.what());
  }
}

void check_tensor(const at::Tensor& tensor, const char* operation) {
  TORCH_CHECK(tensor.defined(), operation, ": an undefined tensor");
  TORCH_CHECK(tensor.is_contiguous(), operation, ": expected a contiguous tensor, got sizes ",
              tensor.sizes(), " with strides ", tensor.strides());
}

void check_reducible(const at::Tensor& tensor, const char* operation) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kInt:
    case at::kLong:
    case at::kByte: return;
    default:
      TORCH_CHECK(false, operation, ": ", tensor.scalar_type(),
                  " is not reduced (float32, float64, bfloat16, int32, int64, uint8 are)");
  }
}

void check_member(int64_t rank, const Group& group, const char* operation) {
  TORCH_CHECK(0 <= rank && rank < group.size(), operation, ": rank ", rank, " is not in group '",
              group.name(), "' of ", group.size());
}

// `whole` holds size() parts, as output of a gather or input of a scatter.
void check_parts(const at::Tensor& whole, const at::Tensor& part, const Group& group,
                 const char* operation) {
  check_tensor(whole, operation);
  check_tensor(part, operation);
  TORCH_CHECK(whole.scalar_type() == part.scalar_type() && whole.device() == part.device(),
              operation, ": ", whole.scalar_type(), " on ", whole.device(), " does not go with ",
              part.scalar_type(), " on ", part.device());
  TORCH_CHECK(whole.numel() == group.size() * part.numel(), operation, ": sizes ", whole.sizes(),
              " are not ", group.size(), " times sizes ", part.sizes());
}

// c10d's collectives on one tensor by their names from torch 2.15 on, which deprecates those of
// before; templates, so that only the one in use is looked at.
template <typename ProcessGroup>
WorkPtr all_gather_single(ProcessGroup& group, at::Tensor& to, at::Tensor& from,
                          const c10d::AllgatherOptions& options) {
  if constexpr (requires { group.all_gather_single(to, from, options); }) {
    return group.all_gather_single(to, from, options);
  } else {
    return group._allgather_base(to, from, options);
  }
}

template <typename ProcessGroup>
WorkPtr reduce_scatter_single(ProcessGroup& group, at::Tensor& to, at::Tensor& from,
                              const c10d::ReduceScatterOptions& options) {
  if constexpr (requires { group.reduce_scatter_single(to, from, options); }) {
    return group.reduce_scatter_single(to, from, options);
  } else {
    return group._reduce_scatter_base(to, from, options);
  }
}

template <typename ProcessGroup>
WorkPtr all_to_all_single(ProcessGroup& group, at::Tensor& to, at::Tensor& from,
                          std::vector<int64_t> to_splits, std::vector<int64_t> from_splits,
                          const c10d::AllToAllOptions& options) {
  if constexpr (requires { group.all_to_all_single(to, from, to_splits, from_splits, options); }) {
    return group.all_to_all_single(to, from, to_splits, from_splits, options);
  } else {
    return group.alltoall_base(to, from, to_splits, from_splits, options);
  }
}

Watchdog::Watched hold(const Group& group, uint64_t number) {
  return group.watchdog() ? group.watchdog()->hold(number, group.timeout()) : Watchdog::Watched();
}

// `flat` is one-dimensional and made of a share for each member.
void check_shares(const at::Tensor& flat, const std::vector<int64_t>& shares, const Group& group,
                  const char* operation) {
  check_tensor(flat, operation);
  TORCH_CHECK(flat.dim() == 1 && static_cast<int64_t>(shares.size()) == group.size() &&
                  c10::sum_integers(shares) == flat.numel(),
              operation, ": sizes ", flat.sizes(), " are not shares of ", at::IntArrayRef(shares),
              " elements for ", group.size(), " members");
}

}  // namespace

/// Counts a call that sends so many bytes (none: it only goes on), and how long it holds its
/// caller.
class CountedCall {
 public:
  CountedCall(const Group& group, const char* operation,
              std::optional<double> sent_bytes = std::nullopt)
      : group_(group), operation_(operation), sent_bytes_(sent_bytes) {
    if (sent_bytes_ && group_.sent_bytes_) {
      *group_.sent_bytes_ += static_cast<int64_t>(*sent_bytes_);
    }
  }
  CountedCall(const CountedCall&) = delete;
  CountedCall& operator=(const CountedCall&) = delete;
  ~CountedCall() {
    if (group_.traffic()) {
      const std::chrono::duration<double, std::milli> waited = std::chrono::steady_clock::now() -
                                                               begun_;
      group_.traffic()->add(group_.name(), operation_,
                            {sent_bytes_ ? 1 : 0, sent_bytes_.value_or(0), waited.count()});
    }
  }

 private:
  const Group& group_;
  const char* operation_;
  std::optional<double> sent_bytes_;
  std::chrono::steady_clock::time_point begun_ = std::chrono::steady_clock::now();
};

namespace {

// Starts a collective on a message of `bytes`, of which this process sends `sent_bytes` (none: what
// bus_factor says), through the dispatcher, out of autograd's sight, and returns the handle that
// completes it.
template <typename Start>
Pending start(const Group& group, const char* operation, std::size_t bytes, const Start& launch,
              std::optional<std::size_t> sent_bytes = std::nullopt) {
  const at::NoGradGuard no_grad;
  const uint64_t number = group.watchdog()
                              ? group.watchdog()->begin_collective(group.name(), operation, bytes)
                              : 0;
  WorkPtr work;
  {
    const double sent = sent_bytes
                            ? static_cast<double>(*sent_bytes)
                            : static_cast<double>(bytes) * bus_factor(operation, group.size());
    const CountedCall counted(group, operation, sent);
    const auto held = hold(group, number);
    work = translated(group, operation, launch);
  }
  return Pending([group, operation, number, work = std::move(work)] {
    const CountedCall counted(group, operation);
    const auto held = hold(group, number);
    translated(group, operation, [&] { return work->wait(); });
    if (group.watchdog()) {
      group.watchdog()->complete_collective(number);
    }
  });
}

}  // namespace

Pending& Pending::operator=(Pending&& other) noexcept {
  std::swap(wait_, other.wait_);
  return *this;
}

Pending::~Pending() {
  if (wait_) {
    try {
      wait();
    } catch (const std::exception& error) {
      TORCH_WARN("drrl: a collective that nobody waited for failed: ", error.what());
    }
  }
}

void Pending::wait() {
  if (const auto wait = std::exchange(wait_, nullptr)) {
    wait();
  }
}

Group::Group() = default;
Group::Group(const Group& other) = default;
Group::Group(Group&& other) noexcept = default;
Group& Group::operator=(const Group& other) = default;
Group& Group::operator=(Group&& other) noexcept = default;
Group::~Group() = default;

Group::Group(std::string name, c10::intrusive_ptr<c10d::ProcessGroup> process_group,
             std::chrono::milliseconds timeout, std::vector<int64_t> world_ranks)
    : name_(std::move(name)),
      process_group_(std::move(process_group)),
      timeout_(timeout),
      world_ranks_(std::move(world_ranks)) {
  if (process_group_) {
    rank_ = process_group_->getRank();
    size_ = process_group_->getSize();
    sent_bytes_ = std::make_shared<std::atomic<int64_t>>(0);
  }
  check(ErrorKind::kUsage,
        world_ranks_.empty() || static_cast<int64_t>(world_ranks_.size()) == size_, "group '",
        name_, "' has ", size_, " members, but ", world_ranks_.size(), " world ranks were given");
  check(ErrorKind::kUsage, size_ == 1 || timeout_.count() > 0, "group '", name_,
        "': the timeout of ", timeout_.count(), " ms is not positive");
}

std::string Group::describe(int64_t rank) const {
  const std::string place = c10::str("group '", name_, "' (rank ", rank, " of ", size_, ")");
  return world_ranks_.empty()
             ? place
             : c10::str("world rank ", world_ranks_.at(static_cast<std::size_t>(rank)), ", ",
                        place);
}

at::Device Group::message_device() const {
  if (!process_group_) {
    return at::kCPU;
  }
  const auto devices = process_group_->getDeviceTypes();
  const bool has_cpu = std::any_of(devices.begin(), devices.end(),
                                   [](const at::Device& device) { return device.is_cpu(); });
  if (has_cpu || devices.empty()) {
    return at::kCPU;
  }
  return process_group_->getBoundDeviceId().value_or(devices.front());
}

Pending Group::all_reduce_async(at::Tensor& tensor, ReduceOp op) const {
  check_tensor(tensor, "all_reduce");
  check_reducible(tensor, "all_reduce");
  if (size_ == 1 || tensor.numel() == 0) {
    return {};
  }
  return start(*this, "all_reduce", tensor.nbytes(), [&] {
    c10d::AllreduceOptions options;
    options.reduceOp = to_c10d(op);
    options.timeout = timeout_;
    std::vector<at::Tensor> tensors = {tensor.detach()};
    return process_group_->allreduce(tensors, options);
  });
}

void Group::all_reduce(at::Tensor& tensor, ReduceOp op) const {
  all_reduce_async(tensor, op).wait();
}

Pending Group::all_gather_async(at::Tensor& output, const at::Tensor& input) const {
  check_parts(output, input, *this, "all_gather");
  if (input.numel() == 0) {
    return {};
  }
  if (size_ == 1) {
    const at::NoGradGuard no_grad;
    output.detach().view(input.sizes()).copy_(input);
    return {};
  }
  return start(*this, "all_gather", output.nbytes(), [&] {
    c10d::AllgatherOptions options;
    options.timeout = timeout_;
    at::Tensor to = output.detach();
    at::Tensor from = input.detach();
    return all_gather_single(*process_group_, to, from, options);
  });
}

void Group::all_gather(at::Tensor& output, const at::Tensor& input) const {
  all_gather_async(output, input).wait();
}

at::Tensor Group::all_gather_uneven(const at::Tensor& input) const {
  check_tensor(input, "all_gather_uneven");
  TORCH_CHECK(input.dim() > 0, "all_gather_uneven: a tensor without dimensions has no rows");
  const at::NoGradGuard no_grad;
  if (size_ == 1) {
    return input.detach().clone();
  }
  // Every member learns the rows of all, and that the rows are alike.
  int64_t row_elements = 1;
  for (int64_t i = 1; i < input.dim(); ++i) {
    row_elements *= input.size(i);
  }
  const at::Tensor own = at::tensor({input.size(0), row_elements}, at::kLong).to(message_device());
  at::Tensor all = at::empty({size_, 2}, own.options());
  all_gather(all, own);
  all = all.cpu();
  std::vector<int64_t> rows;
  for (int64_t member = 0; member < size_; ++member) {
    const int64_t* entry = all.const_data_ptr<int64_t>() + 2 * member;
    check(ErrorKind::kCommunication, entry[1] == row_elements, describe(),
          ": all_gather_uneven of rows of ", row_elements, " elements, but rank ", member,
          " has rows of ", entry[1]);
    rows.push_back(entry[0]);
  }
  return all_gather_uneven(input, rows);
}

at::Tensor Group::all_gather_uneven(const at::Tensor& input, at::IntArrayRef rows) const {
  check_tensor(input, "all_gather_uneven");
  TORCH_CHECK(static_cast<int64_t>(rows.size()) == size_ && input.dim() > 0 &&
                  input.size(0) == rows[static_cast<size_t>(rank_)],
              describe(), ": all_gather_uneven of a tensor ", input.sizes(), " on rank ", rank_,
              ", expected rows ", rows);
  const at::NoGradGuard no_grad;
  if (size_ == 1) {
    return input.detach().clone();
  }
  // Padded to equal sizes, since no c10d backend but ours gathers unequal ones.
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes[0] = *std::max_element(rows.begin(), rows.end());
  at::Tensor padded = input.detach();
  if (input.size(0) != sizes[0]) {
    padded = at::zeros(sizes, input.options());
    padded.narrow(0, 0, input.size(0)).copy_(input);
  }
  sizes.insert(sizes.begin(), size_);
  at::Tensor gathered = at::empty(sizes, input.options());
  all_gather(gathered, padded);
  std::vector<at::Tensor> parts;
  for (int64_t member = 0; member < size_; ++member) {
    parts.push_back(gathered[member].narrow(0, 0, rows[static_cast<size_t>(member)]));
  }
  return at::cat(parts);
}

void Group::reduce_scatter(at::Tensor& output, const at::Tensor& input) const {
  check_parts(input, output, *this, "reduce_scatter");
  check_reducible(input, "reduce_scatter");
  if (output.numel() == 0) {
    return;
  }
  if (size_ == 1) {
    const at::NoGradGuard no_grad;
    output.detach().copy_(input.view(output.sizes()));
    return;
  }
  start(*this, "reduce_scatter", input.nbytes(), [&] {
    c10d::ReduceScatterOptions options;
    options.timeout = timeout_;
    at::Tensor to = output.detach();
    at::Tensor from = input.detach();
    return reduce_scatter_single(*process_group_, to, from, options);
  }).wait();
}

Pending Group::all_to_all_async(at::Tensor& output, const std::vector<int64_t>& receives,
                                const at::Tensor& input, const std::vector<int64_t>& sends) const {
  check_shares(output, receives, *this, "all_to_all");
  check_shares(input, sends, *this, "all_to_all");
  TORCH_CHECK(output.scalar_type() == input.scalar_type() && output.device() == input.device(),
              "all_to_all: ", input.scalar_type(), " on ", input.device(), " does not go with ",
              output.scalar_type(), " on ", output.device());
  if (size_ == 1) {
    const at::NoGradGuard no_grad;
    output.detach().copy_(input);
    return {};
  }
  const auto kept = static_cast<std::size_t>(sends[static_cast<std::size_t>(rank_)]) *
                    input.element_size();
  const auto launch = [&] {
    c10d::AllToAllOptions options;
    options.timeout = timeout_;
    at::Tensor to = output.detach();
    at::Tensor from = input.detach();
    return all_to_all_single(*process_group_, to, from, receives, sends, options);
  };
  return start(
      *this, "all_to_all", output.nbytes(), launch,
      input.nbytes() - kept);  // also with nothing to send or receive here: others may have
}

void Group::broadcast(at::Tensor& tensor, int64_t root) const {
  broadcast_async(tensor, root).wait();
}

Pending Group::broadcast_async(at::Tensor& tensor, int64_t root) const {
  check_tensor(tensor, "broadcast");
  check_member(root, *this, "broadcast");
  if (size_ == 1 || tensor.numel() == 0) {
    return {};
  }
  return start(*this, "broadcast", tensor.nbytes(), [&] {
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.timeout = timeout_;
    std::vector<at::Tensor> tensors = {tensor.detach()};
    return process_group_->broadcast(tensors, options);
  });
}

std::vector<at::Tensor> Group::gather(const at::Tensor& tensor, int64_t root) const {
  check_tensor(tensor, "gather");
  check_member(root, *this, "gather");
  const at::NoGradGuard no_grad;
  if (size_ == 1) {
    return {tensor.detach().clone()};
  }
  std::vector<at::Tensor> outputs;
  for (int64_t member = 0; rank_ == root && member < size_; ++member) {
    outputs.push_back(at::empty_like(tensor.detach()));
  }
  if (tensor.numel() > 0) {
    gather_async(outputs, tensor, root).wait();
  }
  return outputs;
}

Pending Group::gather_async(std::vector<at::Tensor> outputs, const at::Tensor& tensor,
                            int64_t root) const {
  check_tensor(tensor, "gather");
  check_member(root, *this, "gather");
  TORCH_CHECK(static_cast<int64_t>(outputs.size()) == (rank_ == root ? size_ : 0),
              "gather: ", outputs.size(), " outputs on rank ", rank_, " of ", size_, ", root ",
              root);
  if (size_ == 1) {
    const at::NoGradGuard no_grad;
    outputs[0].copy_(tensor);
    return {};
  }
  return start(
      *this, "gather", tensor.nbytes(),
      [&] {
        c10d::GatherOptions options;
        options.rootRank = root;
        options.timeout = timeout_;
        std::vector<at::Tensor> inputs = {tensor.detach()};
        std::vector<std::vector<at::Tensor>> lists;
        if (rank_ == root) {
          lists.push_back(std::move(outputs));
        }
        return process_group_->gather(lists, inputs, options);
      },
      rank_ == root ? 0 : tensor.nbytes());
}

void Group::send(const at::Tensor& tensor, int64_t destination, int tag) const {
  check_tensor(tensor, "send");
  check_member(destination, *this, "send");
  TORCH_CHECK(destination != rank_, "send: rank ", rank_, " of group '", name_,
              "' sends to itself");
  if (tensor.numel() == 0) {
    return;
  }
  start(
      *this, "send", tensor.nbytes(),
      [&] {
        std::vector<at::Tensor> tensors = {tensor.detach()};
        return process_group_->send(tensors, static_cast<int>(destination), tag);
      },
      tensor.nbytes())
      .wait();
}

void Group::receive(at::Tensor& tensor, int64_t source, int tag) const {
  check_tensor(tensor, "receive");
  check_member(source, *this, "receive");
  TORCH_CHECK(source != rank_, "receive: rank ", rank_, " of group '", name_,
              "' receives from itself");
  if (tensor.numel() == 0) {
    return;
  }
  start(
      *this, "receive", tensor.nbytes(),
      [&] {
        std::vector<at::Tensor> tensors = {tensor.detach()};
        return process_group_->recv(tensors, static_cast<int>(source), tag);
      },
      0)
      .wait();
}

void Group::barrier() const {
  if (size_ == 1) {
    return;
  }
  start(
      *this, "barrier", 0,
      [&] {
        c10d::BarrierOptions options;
        options.timeout = timeout_;
        options.device = message_device();
        return process_group_->barrier(options);
      },
      0)
      .wait();
}

}  // namespace drrl
