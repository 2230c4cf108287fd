"""The loop around a decorated flow: observe, model, plan, run by the plan, compare, observe again."""
