// Every collective of Group and of the Open MPI backend, on every dtype, against results worked out
// from the inputs of all ranks.
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "distributed/collectives/agreement.h"
#include "distributed/collectives/group.h"
#include "distributed/mpi/mpi_group.h"
#include "tests/support/mpi_test.h"

namespace drrl {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

constexpr milliseconds kTimeout(20000);
const auto kReducedTypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kInt, at::kLong, at::kByte};
const auto kMovedTypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kInt,
                          at::kLong,  at::kByte,   at::kHalf,     at::kBool};

// Limits that force a path: messages split at 5 elements, rings from the first byte on.
struct Limits {
  const char* name;
  int64_t max_elements;
  int64_t ring_bytes;
};

void PrintTo(const Limits& limits, std::ostream* out) {
  *out << limits.name;
}

class Collectives : public MpiTest, public testing::WithParamInterface<Limits> {
 protected:
  void SetUp() override {
    MpiTest::SetUp();
    if (HasFatalFailure()) {
      return;
    }
    group_ = make_group("test");
    ASSERT_EQ(group_.rank(), rank_);
    ASSERT_EQ(group_.size(), size_);
  }

  // Unlike make_mpi_group, a group of one talks MPI too.
  Group make_group(const std::string& name, milliseconds timeout = kTimeout) const {
    const auto options = c10::make_intrusive<MpiOptions>(name, timeout);
    options->max_elements = GetParam().max_elements;
    options->ring_bytes = GetParam().ring_bytes;
    return Group(name,
                 make_process_group(c10::make_intrusive<MpiBackend>(
                     MpiCommunicator::duplicate(MPI_COMM_WORLD), options)),
                 timeout);
  }

  // Small numbers, exact in every dtype and in sums over 4 ranks, other on every rank and place.
  static at::Tensor input(int64_t rank, int64_t elements, at::ScalarType dtype) {
    const at::Tensor index = at::arange(elements, at::kLong);
    return ((index * 7 + rank * 3).remainder(11) + rank).to(dtype);
  }
  at::Tensor input(int64_t elements, at::ScalarType dtype) const {
    return input(rank_, elements, dtype);
  }

  at::Tensor sum_of_inputs(int64_t elements, at::ScalarType dtype) const {
    at::Tensor sum = at::zeros({elements}, at::kLong);
    for (int64_t rank = 0; rank < size_; ++rank) {
      sum += input(rank, elements, at::kLong);
    }
    return sum.to(dtype);
  }

  // Fewer elements than ranks, odd counts, and one above the size from which an all-reduce is a
  // ring (too many pieces of five).
  static std::vector<int64_t> sizes() {
    return {1, 2, 7, 103, GetParam().max_elements > 5 ? 70001 : 201};
  }
  static int64_t large() { return sizes().back(); }

  // Through c10d, beneath Group: what Group does not offer or leaves out.
  c10d::ProcessGroup& raw() const { return *group_.process_group(); }
  c10d::Backend& backend() const { return *raw().getBackend(at::kCPU); }

  Group group_;
};

TEST_P(Collectives, AllReduceSums) {
  for (const auto dtype : kReducedTypes) {
    for (const int64_t elements : sizes()) {
      at::Tensor x = input(elements, dtype);
      group_.all_reduce(x);
      EXPECT_TRUE(x.equal(sum_of_inputs(elements, dtype))) << dtype << " x " << elements;
    }
  }
}

TEST_P(Collectives, AllReduceTakesMaximumAndMinimum) {
  for (const auto dtype : kReducedTypes) {
    for (const int64_t elements : sizes()) {
      at::Tensor most = input(0, elements, dtype);
      at::Tensor least = most.clone();
      for (int64_t rank = 1; rank < size_; ++rank) {
        most = at::maximum(most, input(rank, elements, dtype));
        least = at::minimum(least, input(rank, elements, dtype));
      }
      at::Tensor x = input(elements, dtype);
      group_.all_reduce(x, ReduceOp::kMax);
      EXPECT_TRUE(x.equal(most)) << dtype << " x " << elements;
      x = input(elements, dtype);
      group_.all_reduce(x, ReduceOp::kMin);
      EXPECT_TRUE(x.equal(least)) << dtype << " x " << elements;
    }
  }
}

TEST_P(Collectives, AllReduceIsAccurateAndBitEqualOnAllRanks) {
  const int64_t elements = large();
  at::Tensor exact = at::zeros({elements}, at::kDouble);
  at::Tensor x;
  for (int64_t rank = 0; rank < size_; ++rank) {
    const at::Tensor one = at::randn(
        {elements}, at::detail::createCPUGenerator(static_cast<uint64_t>(rank) + 1), at::kFloat);
    exact += one;
    x = rank == rank_ ? one : x;
  }
  group_.all_reduce(x);
  EXPECT_LT((x.to(at::kDouble) - exact).abs().max().item<double>(), 2e-6);
  check_agreement(group_, hash_bytes(x.const_data_ptr(), x.nbytes()), "the sum");
}

TEST_P(Collectives, BFloat16IsRoundedOnce) {
  // 256 + 1 rounds back to 256 in bfloat16: rounding at every hop would lose all the ones.
  at::Tensor x = at::full({3}, rank_ == 0 ? 256.0 : 1.0, at::kBFloat16);
  group_.all_reduce(x);
  const at::Tensor expected = at::full({3}, 256.0 + (size_ - 1), at::kFloat).to(at::kBFloat16);
  EXPECT_TRUE(x.equal(expected)) << x[0].item<float>() << " instead of "
                                 << expected[0].item<float>();

  at::Tensor share = at::empty({2}, at::kBFloat16);
  const at::Tensor parts = at::full({2 * size_}, rank_ == 0 ? 256.0 : 1.0, at::kBFloat16);
  group_.reduce_scatter(share, parts);
  EXPECT_TRUE(share.equal(expected.slice(0, 0, 2)));
}

TEST_P(Collectives, Int64KeepsAllBits) {
  at::Tensor x = at::full({4}, (int64_t{1} << 60) + rank_, at::kLong);
  group_.all_reduce(x, ReduceOp::kMax);
  EXPECT_EQ(x[3].item<int64_t>(), (int64_t{1} << 60) + size_ - 1);
}

TEST_P(Collectives, SumKeepsNotANumber) {
  for (const int64_t elements : {int64_t{3}, large()}) {
    at::Tensor x = at::zeros({elements});
    if (rank_ == size_ - 1) {
      x[elements - 1] = std::numeric_limits<float>::quiet_NaN();
    }
    group_.all_reduce(x);
    EXPECT_TRUE(std::isnan(x[elements - 1].item<float>()));
    EXPECT_EQ(x[0].item<float>(), 0);
  }
}

TEST_P(Collectives, AllGatherConcatenates) {
  for (const auto dtype : kMovedTypes) {
    for (const int64_t rows : {1, 3, 40}) {
      const at::Tensor x = input(rows * 2, dtype).view({rows, 2});
      at::Tensor y = at::empty({size_ * rows, 2}, x.options());
      group_.all_gather(y, x);
      for (int64_t rank = 0; rank < size_; ++rank) {
        EXPECT_TRUE(
            y.narrow(0, rank * rows, rows).equal(input(rank, rows * 2, dtype).view({rows, 2})))
            << dtype << " x " << rows;
      }
    }
  }
}

TEST_P(Collectives, AllGatherInPlace) {
  at::Tensor y = at::full({size_ * 5}, -1, at::kInt);
  at::Tensor own = y.narrow(0, rank_ * 5, 5);
  own.copy_(input(5, at::kInt));
  group_.all_gather(y, own);
  for (int64_t rank = 0; rank < size_; ++rank) {
    EXPECT_TRUE(y.narrow(0, rank * 5, 5).equal(input(rank, 5, at::kInt)));
  }
}

TEST_P(Collectives, AllGatherUnevenRows) {
  // 0 rows on rank 0, 3 on rank 1, 6 on rank 2, ...
  for (const auto dtype : kMovedTypes) {
    const at::Tensor x = input(rank_ * 3 * 2, dtype).view({rank_ * 3, 2});
    std::vector<at::Tensor> expected;
    std::vector<int64_t> rows;
    for (int64_t rank = 0; rank < size_; ++rank) {
      rows.push_back(rank * 3);
      expected.push_back(input(rank, rank * 3 * 2, dtype).view({rank * 3, 2}));
    }
    EXPECT_TRUE(group_.all_gather_uneven(x).equal(at::cat(expected))) << dtype;
    EXPECT_TRUE(group_.all_gather_uneven(x, rows).equal(at::cat(expected))) << dtype;
  }
  EXPECT_EQ(group_.all_gather_uneven(at::empty({0, 4})).sizes(), at::IntArrayRef({0, 4}));
  EXPECT_THROW(group_.all_gather_uneven(at::empty({2, 4}),
                                        std::vector<int64_t>(static_cast<size_t>(size_), 1)),
               c10::Error);
}

TEST_P(Collectives, ReduceScatterSums) {
  for (const auto dtype : kReducedTypes) {
    for (const int64_t elements : {1, 3, 41}) {
      const at::Tensor x = input(size_ * elements, dtype);
      at::Tensor y = at::empty({elements}, x.options());
      group_.reduce_scatter(y, x);
      EXPECT_TRUE(
          y.equal(sum_of_inputs(size_ * elements, dtype).narrow(0, rank_ * elements, elements)))
          << dtype << " x " << elements;
      EXPECT_TRUE(x.equal(input(size_ * elements, dtype))) << "the input was changed";
    }
  }
}

TEST_P(Collectives, ReduceScatterInPlace) {
  at::Tensor x = input(size_ * 4, at::kFloat);
  at::Tensor own = x.narrow(0, rank_ * 4, 4);
  group_.reduce_scatter(own, x);
  EXPECT_TRUE(own.equal(sum_of_inputs(size_ * 4, at::kFloat).narrow(0, rank_ * 4, 4)));
}

TEST_P(Collectives, BroadcastFromEveryRoot) {
  for (const auto dtype : kMovedTypes) {
    for (int64_t root = 0; root < size_; ++root) {
      for (const int64_t elements : sizes()) {
        at::Tensor x = input(elements, dtype);
        group_.broadcast(x, root);
        EXPECT_TRUE(x.equal(input(root, elements, dtype)))
            << dtype << " x " << elements << " from " << root;
      }
    }
  }
}

TEST_P(Collectives, GatherToEveryRoot) {
  for (const auto dtype : kMovedTypes) {
    for (int64_t root = 0; root < size_; ++root) {
      const auto parts = group_.gather(input(6, dtype).view({2, 3}), root);
      ASSERT_EQ(static_cast<int64_t>(parts.size()), rank_ == root ? size_ : 0);
      for (std::size_t rank = 0; rank < parts.size(); ++rank) {
        EXPECT_TRUE(parts[rank].equal(input(static_cast<int64_t>(rank), 6, dtype).view({2, 3})))
            << dtype << " to " << root;
      }
    }
  }
}

TEST_P(Collectives, MessagesGoRoundARing) {
  if (size_ == 1) {
    return;  // a group of one has nobody to write to
  }
  const int64_t next = (rank_ + 1) % size_;
  const int64_t previous = (rank_ + size_ - 1) % size_;
  for (const auto dtype : kMovedTypes) {
    for (const int64_t elements : sizes()) {
      at::Tensor received = at::empty({elements}, dtype);
      // Rank 0 starts, so that blocking calls cannot wait in a circle.
      if (rank_ == 0) {
        group_.send(input(elements, dtype), next);
        group_.receive(received, previous);
      } else {
        group_.receive(received, previous);
        group_.send(input(elements, dtype), next);
      }
      EXPECT_TRUE(received.equal(input(previous, elements, dtype))) << dtype << " x " << elements;
    }
  }
}

TEST_P(Collectives, MessagesAreMatchedByTagAndRunBesideCollectives) {
  if (size_ == 1) {
    return;
  }
  const int next = (rank_ + 1) % size_;
  const int previous = (rank_ + size_ - 1) % size_;
  // All ranks send before anyone receives, with a collective between: too large to be buffered, so
  // only concurrency helps.
  const int64_t elements = large();
  std::vector<at::Tensor> first = {input(elements, at::kFloat)};
  std::vector<at::Tensor> second = {input(elements, at::kFloat) + 100};
  auto sent_first = raw().send(first, next, 1);
  auto sent_second = raw().send(second, next, 2);
  group_.barrier();
  std::vector<at::Tensor> got_second = {at::empty({elements})};
  std::vector<at::Tensor> got_first = {at::empty({elements})};
  auto received_second = raw().recv(got_second, previous, 2);
  auto received_first = raw().recv(got_first, previous, 1);
  for (const auto& work : {sent_first, sent_second, received_first, received_second}) {
    EXPECT_TRUE(work->wait());
  }
  EXPECT_TRUE(got_first[0].equal(input(previous, elements, at::kFloat)));
  EXPECT_TRUE(got_second[0].equal(input(previous, elements, at::kFloat) + 100));
}

TEST_P(Collectives, AsynchronousOnesRunInOrder) {
  std::vector<at::Tensor> tensors;
  std::vector<Pending> pending;
  for (int64_t i = 0; i < 40; ++i) {
    tensors.push_back(input(1 + i * i * large() / 1600, at::kFloat) + i);
    pending.push_back(group_.all_reduce_async(tensors.back()));
  }
  // The same tensor again and again: each all-reduce must see the result of the one before.
  at::Tensor chain = at::ones({3});
  for (int i = 0; i < 5; ++i) {
    pending.push_back(group_.all_reduce_async(chain));
  }
  at::Tensor gathered = at::empty({size_ * 2});
  const at::Tensor own = at::full({2}, rank_);
  pending.push_back(group_.all_gather_async(gathered, own.to(at::kFloat)));
  while (!pending.empty()) {
    pending.back().wait();
    pending.pop_back();
  }
  for (int64_t i = 0; i < 40; ++i) {
    const auto& tensor = tensors[static_cast<std::size_t>(i)];
    EXPECT_TRUE(tensor.equal(sum_of_inputs(tensor.numel(), at::kFloat) + i * size_)) << i;
  }
  EXPECT_EQ(chain[0].item<double>(), std::pow(size_, 5));
  EXPECT_EQ(gathered[2 * size_ - 1].item<double>(), size_ - 1);
}

TEST_P(Collectives, DestroyingAPendingOneWaitsForIt) {
  at::Tensor x = at::ones({large()});
  {
    const Pending pending = group_.all_reduce_async(x);
  }
  EXPECT_TRUE(x.equal(at::full({large()}, static_cast<float>(size_))));
}

TEST_P(Collectives, TwoGroupsWorkAtTheSameTime) {
  // The ranks wait in opposite orders, which deadlocks unless each group makes progress by itself.
  const Group other = make_group("other");
  at::Tensor x = input(large(), at::kFloat);
  at::Tensor y = input(large(), at::kFloat);
  Pending first = group_.all_reduce_async(x);
  Pending second = other.all_reduce_async(y);
  if (rank_ % 2 == 0) {
    first.wait();
    second.wait();
  } else {
    second.wait();
    first.wait();
  }
  EXPECT_TRUE(x.equal(sum_of_inputs(large(), at::kFloat)));
  EXPECT_TRUE(y.equal(x));
}

TEST_P(Collectives, AutogradDoesNotSeeThem) {
  at::Tensor x = input(10, at::kFloat).requires_grad_();
  group_.all_reduce(x);
  EXPECT_TRUE(x.detach().equal(sum_of_inputs(10, at::kFloat)));
  EXPECT_TRUE(x.is_leaf());
  EXPECT_FALSE(group_.all_gather_uneven(x).requires_grad());
}

TEST_P(Collectives, EmptyTensorsReachTheBackendUnharmed) {
  std::vector<at::Tensor> empty = {at::empty({0})};
  EXPECT_TRUE(raw().allreduce(empty)->wait());
  EXPECT_TRUE(raw().broadcast(empty)->wait());
  at::Tensor in = at::empty({0, 3});
  at::Tensor out = at::empty({0, 3});
  EXPECT_TRUE(backend()._allgather_base(out, in)->wait());
  EXPECT_TRUE(backend()._reduce_scatter_base(out, in)->wait());
  std::vector<std::vector<at::Tensor>> outputs;
  if (rank_ == 0) {
    outputs.emplace_back(static_cast<std::size_t>(size_), at::empty({0}));
  }
  EXPECT_TRUE(raw().gather(outputs, empty)->wait());
  group_.barrier();
}

TEST_P(Collectives, ListsMayBeUneven) {
  for (const auto dtype : kReducedTypes) {
    // Member i has 3 i + 1 elements.
    std::vector<std::vector<at::Tensor>> gathered(1);
    std::vector<std::vector<at::Tensor>> shares(1);
    for (int64_t rank = 0; rank < size_; ++rank) {
      gathered[0].push_back(at::empty({3 * rank + 1}, dtype));
      shares[0].push_back(input(3 * rank + 1, dtype));
    }
    std::vector<at::Tensor> own = {input(3 * rank_ + 1, dtype)};
    EXPECT_TRUE(raw().allgather(gathered, own)->wait());
    for (int64_t rank = 0; rank < size_; ++rank) {
      EXPECT_TRUE(
          gathered[0][static_cast<std::size_t>(rank)].equal(input(rank, 3 * rank + 1, dtype)))
          << dtype;
    }
    std::vector<at::Tensor> sum = {at::empty({3 * rank_ + 1}, dtype)};
    EXPECT_TRUE(raw().reduce_scatter(sum, shares)->wait());
    EXPECT_TRUE(sum[0].equal(sum_of_inputs(3 * rank_ + 1, dtype))) << dtype;
  }
}

TEST_P(Collectives, ReduceToEveryRoot) {
  for (const auto dtype : kReducedTypes) {
    for (int root = 0; root < size_; ++root) {
      c10d::ReduceOptions options;
      options.rootRank = root;
      std::vector<at::Tensor> x = {input(11, dtype)};
      EXPECT_TRUE(raw().reduce(x, options)->wait());
      if (rank_ == root) {
        EXPECT_TRUE(x[0].equal(sum_of_inputs(11, dtype))) << dtype << " to " << root;
      }
    }
  }
}

TEST_P(Collectives, AllToAllExchangesUnevenRows) {
  // Rank s sends s + d + 1 rows of value 10 s + d to rank d.
  std::vector<int64_t> sends;
  std::vector<int64_t> receives;
  std::vector<at::Tensor> in;
  std::vector<at::Tensor> expected;
  for (int64_t peer = 0; peer < size_; ++peer) {
    sends.push_back(rank_ + peer + 1);
    receives.push_back(rank_ + peer + 1);
    in.push_back(at::full({sends.back(), 2}, 10 * rank_ + peer, at::kInt));
    expected.push_back(at::full({receives.back(), 2}, 10 * peer + rank_, at::kInt));
  }
  at::Tensor input = at::cat(in);
  at::Tensor output = at::empty_like(at::cat(expected));
  EXPECT_TRUE(backend().alltoall_base(output, input, receives, sends)->wait());
  EXPECT_TRUE(output.equal(at::cat(expected)));

  std::vector<int64_t> equal;
  at::Tensor own = at::full({size_}, rank_, at::kLong);
  at::Tensor all = at::empty({size_}, at::kLong);
  EXPECT_TRUE(backend().alltoall_base(all, own, equal, equal)->wait());
  EXPECT_TRUE(all.equal(at::arange(size_, at::kLong)));
}

TEST_P(Collectives, WorkHasAResultAFutureAndANumber) {
  std::vector<at::Tensor> x = {input(5, at::kFloat)};
  const auto before = raw().getBackend(at::kCPU)->getSequenceNumberForGroup();
  const auto work = raw().allreduce(x);
  EXPECT_EQ(work->getSequencenumber(), before + 1);
  work->getFuture()->wait();
  EXPECT_TRUE(work->isCompleted());
  EXPECT_TRUE(
      work->getFuture()->value().toTensorVector().at(0).equal(sum_of_inputs(5, at::kFloat)));
  EXPECT_TRUE(work->result().at(0).is_same(x[0]) || work->result().at(0).equal(x[0]));
}

TEST_P(Collectives, RefuseTensorsThatBreakTheContract) {
  at::Tensor half = at::ones({4}, at::kHalf);
  EXPECT_THROW(group_.all_reduce(half), c10::Error);  // moved, but not reduced
  std::vector<at::Tensor> raw_half = {half};
  EXPECT_THROW(raw().allreduce(raw_half), c10::Error);
  std::vector<at::Tensor> strided = {at::ones({4, 4}).t()};
  EXPECT_THROW(raw().allreduce(strided), c10::Error);
  std::vector<at::Tensor> two = {at::ones({1}), at::ones({1})};
  EXPECT_THROW(raw().allreduce(two), c10::Error);
  at::Tensor in = at::ones({2});
  at::Tensor out = at::ones({2 * size_ + 1});
  EXPECT_THROW(backend()._allgather_base(out, in), c10::Error);
  EXPECT_THROW(group_.all_gather(out, in), c10::Error);
  c10d::BroadcastOptions options;
  options.rootRank = size_;
  std::vector<at::Tensor> x = {at::ones({1})};
  EXPECT_THROW(raw().broadcast(x, options), c10::Error);
  // A refusal at the call reached nobody: the group still works.
  at::Tensor fine = at::ones({1});
  group_.all_reduce(fine);
  EXPECT_EQ(fine.item<int>(), size_);
}

TEST_P(Collectives, UnevenRowsMustBeAlike) {
  if (size_ == 1) {
    return;
  }
  const at::Tensor x = at::ones({2, rank_ == size_ - 1 ? 3 : 2});
  EXPECT_THAT(error_of(ErrorKind::kCommunication, [&] { group_.all_gather_uneven(x); }),
              HasSubstr("rows of"));
}

TEST_P(Collectives, AgreementNamesTheRanksThatDiffer) {
  check_agreement(group_, 42, "the answer");
  if (size_ == 1) {
    return;
  }
  // Three or more: the majority is right. Two: rank 0 is.
  const int odd_one = size_ == 2 ? 1 : 0;
  const std::string message = error_of(ErrorKind::kCommunication, [&] {
    check_agreement(group_, rank_ == odd_one ? 0xbad : 0x900d, "rank decisions");
  });
  EXPECT_THAT(message, AllOf(HasSubstr("rank decisions"), HasSubstr("expected 900d"),
                             HasSubstr(c10::str("(rank ", odd_one, " of ", size_, ") has bad"))));
  EXPECT_THAT(message, testing::Not(HasSubstr(c10::str("(rank ", 1 - odd_one, " of"))));
}

TEST_P(Collectives, FactsMustBeAlike) {
  const TextExchange exchange = exchange_over(group_);
  const std::string anywhere = c10::str("/node", rank_), lr = rank_ == size_ - 1 ? "0.2" : "0.1";
  check_agreement(
      exchange,
      {{"--lr", "0.1"}, {"text", "8 bytes", anywhere}, {c10::str("shard ", rank_), anywhere}},
      ErrorKind::kUsage, "inputs");
  if (size_ > 1) {
    EXPECT_THAT(
        error_of(ErrorKind::kUsage,
                 [&] {
                   check_agreement(exchange, {{"--lr", lr}, {"text", "8 bytes", anywhere}},
                                   ErrorKind::kUsage, "options");
                 }),
        AllOf(HasSubstr("need the same options: --lr is 0.1 on rank"),
              HasSubstr(c10::str(", 0.2 on rank ", size_ - 1)), testing::Not(HasSubstr("text"))));
    const std::string bytes = rank_ == 0 ? "\xff" : "\xfe";  // no UTF-8
    EXPECT_THAT(error_of(ErrorKind::kUsage,
                         [&] {
                           check_agreement(exchange, {{"--output", bytes}}, ErrorKind::kUsage,
                                           "options");
                         }),
                HasSubstr("--output is "));
  }
}

INSTANTIATE_TEST_SUITE_P(Limits, Collectives,
                         testing::Values(Limits{"Default", int64_t{1} << 30, 128 * 1024},
                                         Limits{"SplitAtFive", 5, int64_t{1} << 40},
                                         Limits{"RingsOfFive", 5, 0},
                                         Limits{"Rings", int64_t{1} << 30, 0}),
                         [](const auto& limits) { return limits.param.name; });

}  // namespace
}  // namespace drrl
