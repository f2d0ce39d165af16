#include "policy/online/controller_observer.h"

#include <cmath>
#include <utility>

#include "core/error.h"

namespace drrl {

ControllerObserver::ControllerObserver(std::shared_ptr<LowRankController> controller,
                                       double guard_eps, double guard_decay)
    : controller_(std::move(controller)),
      guard_eps_(guard_eps),
      guard_decay_(guard_decay),
      description_(c10::str(controller_->describe(), ", guard decay ", guard_decay)) {}

void ControllerObserver::begin_step(int64_t step) {
  controller_->take_statistics();
  controller_->set_guard_eps(guard_eps_ * std::pow(guard_decay_, static_cast<double>(step - 1)));
}

void ControllerObserver::end_step(AttentionStatistics& spent) {
  spent += controller_->take_statistics();
}

void ControllerObserver::load(const std::string& state) {
  check(ErrorKind::kCheckpoint, state == description_,
        "the checkpoint was written under the rank policy '", state, "', this run has '",
        description_, "'");
}

}  // namespace drrl
