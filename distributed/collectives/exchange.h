#pragma once

#include <vector>

#include <ATen/ATen.h>

#include "distributed/collectives/group.h"

namespace drrl {

/// A tensor that member `from` of a group hands to member `to`.
struct Message {
  int64_t from, to;
  std::vector<int64_t> shape;
};

/// Many messages between the members of a group as one flat all-to-all. Every member knows the list
/// of all messages and brings the contents of its own; a message to oneself is handed over as it is
/// and does not travel.
///
/// Collective over `group`; with the same list everywhere. Autograd does not see it. Errors: as
/// Group's; c10::Error for contents that are not of the message's shape.
class Exchange {
 public:
  /// Starts it. contents[i], of dtype and device of `options`, belongs to messages[i]; it is looked
  /// at only where this member is its `from`.
  Exchange(const Group& group, const std::vector<Message>& messages,
           const std::vector<at::Tensor>& contents, const at::TensorOptions& options);

  /// By message: its contents where this member is its `to`, else undefined. At most once.
  std::vector<at::Tensor> wait();

  /// That leave this member.
  int64_t bytes_sent() const noexcept { return bytes_sent_; }

 private:
  std::vector<at::Tensor> received_;  // views of a buffer that is still being filled
  at::Tensor outgoing_;
  int64_t bytes_sent_ = 0;
  Pending pending_;
};

}  // namespace drrl
