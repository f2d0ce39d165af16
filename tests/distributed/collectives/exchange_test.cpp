#include "distributed/collectives/exchange.h"

#include <c10/util/accumulate.h>

#include "distributed/mpi/mpi_group.h"
#include "tests/support/mpi_test.h"

namespace drrl {
namespace {

class ExchangeTest : public MpiTest {
 protected:
  Group world() const {
    return make_mpi_group("world", MPI_COMM_WORLD, std::chrono::milliseconds(20000));
  }
};

at::Tensor content(const Message& message) {
  return at::arange(c10::multiply_integers(message.shape), at::kFloat).view(message.shape) +
         (100.0 * message.from + 1000.0 * message.to);
}

TEST_F(ExchangeTest, DeliversEveryMessage) {
  const Group group = world();
  std::vector<Message> messages;
  for (int64_t from = size_ - 1; from >= 0; --from) {
    for (int64_t to = 0; to < size_; ++to) {
      if ((from + 2 * to) % 3 != 1) {  // some pairs have nothing to say, some more than others
        messages.push_back({from, to, {1 + from, 2}});
        messages.push_back({from, to, {to, 3, 1}});
      }
    }
  }
  std::vector<at::Tensor> contents;
  int64_t bytes = 0;
  for (const Message& message : messages) {
    contents.push_back(message.from == rank_ ? content(message) : at::Tensor());
    bytes += message.from == rank_ && message.to != rank_
                 ? static_cast<int64_t>(contents.back().nbytes())
                 : 0;
  }
  Exchange exchange(group, messages, contents, at::kFloat);
  EXPECT_EQ(exchange.bytes_sent(), bytes);
  const auto received = exchange.wait();
  for (size_t i = 0; i < messages.size(); ++i) {
    ASSERT_EQ(received[i].defined(), messages[i].to == rank_);
    if (messages[i].to == rank_) {
      EXPECT_TRUE(received[i].equal(content(messages[i])))
          << messages[i].from << " to " << messages[i].to;
    }
  }
}

TEST_F(ExchangeTest, OfMessagesToOneselfNeedsNobody) {
  const at::Tensor own = at::ones({2, 2});
  const auto received = Exchange(world(), {{rank_, rank_, {2, 2}}}, {own}, at::kFloat).wait();
  EXPECT_TRUE(received[0].is_same(own));
}

TEST_F(ExchangeTest, RefusesContentsOfAnotherShape) {
  EXPECT_THROW(Exchange(world(), {{rank_, rank_, {3}}}, {at::ones({2})}, at::kFloat), c10::Error);
  EXPECT_THROW(Exchange(world(), {{rank_, rank_, {2}}}, {at::ones({2}, at::kDouble)}, at::kFloat),
               c10::Error);
  EXPECT_THROW(Exchange(world(), {{rank_, rank_, {2}}}, {at::Tensor()}, at::kFloat), c10::Error);
}

}  // namespace
}  // namespace drrl
