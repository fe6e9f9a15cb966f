"""What a step should take, predicted and timed, and so how it is carried out; also on clusters that are not there."""
